"""Memory of a device: by hand, against what autograd keeps, and against peaks that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_workload import MODEL, WORK
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_core.costs.hardware import parse_hardware
from rlhf_core.costs.memory import Overhead, device_memory, kept_bytes
from rlhf_core.costs.operations import Shape
from rlhf_core.costs.workload import Workload
from rlhf_core.models.activations import fuse_activations
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows


def test_by_hand() -> None:
    """1,400 parameters: 5,600 bytes of weights, 11,200 of moments, 5,600 of gradients, 2,800 of a frozen copy."""
    moments = device_memory(WORK, parse_hardware("1xH200"), Overhead(100, 0.5)).moments
    resident = {"trained weights": 5600, "AdamW's moments": 11_200}

    def whole(parts: Mapping[str, float]) -> dict[str, float]:
        return dict(parts) | {"temporaries, heap": sum(parts.values()) / 2, "libraries": 100}

    frozen = {"reference": 2800, "reward models": 2800}
    cast = 2 * (1000 + 50 * 8)
    in_decoding = {"keys and values": 8 * (3 + 6) * 2 * 16 * 2, "logits": 4 * 3 * 8 * 50}
    assert moments["generate"] == whole(resident | frozen | {"gradients": 5600, "cast weights": cast} | in_decoding)
    # of a token in a layer, 4-byte numbers: x, x'; 2-byte: a, h, q, attended, k, v, u, g
    each = 4 * (8 + 8) + 2 * (8 + 8 + 8 + 8 + 16 + 32 + 32)
    in_update = {"cast weights": cast, "activations": 4 * 7 * 2 * each, "logits": 4 * 4 * 5 * 50}
    assert moments["update"] == whole(resident | frozen | in_update)


def test_gradients_meet_activations_only_between_micro_batches() -> None:
    split = replace(WORK, micro_batch_rows=1)
    moments = device_memory(split, parse_hardware("1xH200"), Overhead(0, 0)).moments
    assert moments["update"]["gradients"] == 5600
    assert (
        moments["update"]["activations"]
        == device_memory(WORK, parse_hardware("1xH200"), Overhead(0, 0)).moments["update"]["activations"] / 4
    )


def test_devices_share_what_is_trained_and_copy_the_rest() -> None:
    moments = device_memory(WORK.on(2), parse_hardware("2xH100"), Overhead(0, 0)).moments["generate"]
    assert (moments["trained weights"], moments["AdamW's moments"], moments["gradients"]) == (2800, 5600, 2800)
    assert (moments["whole copies that generate"], moments["reference"]) == (5600, 2800)
    assert moments["keys and values"] == 4 * (3 + 6) * 2 * 16 * 2
    update = device_memory(WORK.on(2), parse_hardware("2xH100"), Overhead(0, 0)).moments["update"]
    assert update["cast weights"] == 2 * (1000 + 50 * 8) + 4 * (2 * 1000 / 2 + 400), "two of two layers are gathered"


def test_each_lever_takes_something_away() -> None:
    def peak(work: Workload) -> float:
        return device_memory(work, parse_hardware("1xH200"), Overhead(0, 0)).peak_bytes

    separate = replace(WORK, critic=MODEL)
    assert peak(separate.with_shared_critic()) < peak(separate)
    assert peak(replace(WORK, recomputes=True)) < peak(WORK)
    assert peak(WORK.with_lora(1)) < peak(WORK)
    gone = device_memory(replace(WORK, frozen_stay=False), parse_hardware("1xH200"), Overhead(0, 0)).moments
    assert ("reference" in gone["update"], "reference" in gone["passes"]) == (False, True)


def kept_by_autograd(kind: str, dtype: torch.dtype, row_len: int, **sizes: Any) -> tuple[float, Shape]:
    """Bytes that a training pass over two rows keeps, each storage once, weights and their copies left out."""
    plain: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4}
    plain |= {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **plain, **sizes))
    fuse_activations(model)
    policy, shape = LanguageModel(model, dtype=dtype, device=torch.device("cpu")), Shape.of(model)
    rows = PackedRows.of([[2 + i % 290 for i in range(row_len)]] * 2)
    policy.hidden_states(rows)  # the probe of a first pass
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = policy.hidden_states(rows)
    del graph
    cast = 2 * shape.linear_parameters if dtype is torch.bfloat16 else 0
    return sum(kept.values()) - cast, shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "row_len", "sizes", "off"),
    [
        ("gpt2", 64, {}, 0.1),
        ("gpt2", 520, {}, 0.1),  # too long for the passes that are written out
        ("llama", 64, {"intermediate_size": 344, "num_key_value_heads": 2}, 0.1),
        ("qwen3", 64, {"intermediate_size": 344, "num_key_value_heads": 2, "head_dim": 32}, 0.2),  # norms of q and k
        ("gpt_neox", 64, {"intermediate_size": 512}, 0.25),
    ],
)
def test_activations_are_what_autograd_keeps(
    kind: str, row_len: int, sizes: dict[str, int], off: float, dtype: str
) -> None:
    kept, shape = kept_by_autograd(kind, getattr(torch, dtype), row_len, **sizes)
    predicted = kept_bytes(shape, dtype, rows=2, row_len=row_len, is_cpu=True)
    assert predicted == pytest.approx(kept, rel=off)
