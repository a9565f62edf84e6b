"""An iteration small enough to be counted by hand."""

from __future__ import annotations

from rlhf_core.costs.operations import Shape
from rlhf_core.costs.workload import Model, Workload

SHAPE = Shape(
    linear_parameters=1000,
    layers=2,
    attention_width=8,
    hidden_size=8,
    vocabulary=50,
    kv_width=16,
    mlp_width=32,
    linear_edges=200,
)
MODEL = Model(SHAPE, parameters=1400, dtype="bfloat16")
WORK = Workload(
    prompts=4, samples_per_prompt=2, prompt_len=3, response_len=5, longest_response=6, decoding_rows=8, epochs=1,
    minibatches=2, minibatch_rows=4, micro_batch_rows=4, policy=MODEL, critic=None, reference=MODEL,
    reference_shares_trunk=False, rewards=(MODEL,), reference_rows=4, reward_rows=4,
)  # fmt: skip
