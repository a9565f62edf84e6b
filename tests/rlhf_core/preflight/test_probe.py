"""The probe finds what no file tells: mixed rows, lost states, numbers that are not finite; and changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import SMALL, save_random
from iteration import Bench
from safetensors.torch import load_file, save_file

from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.models.language_model import LanguageModel
from rlhf_core.models.packing import PackedRows
from rlhf_core.models.soundness import ROW_TOLERANCE, causal_distance, decoding_distance, row_distance
from rlhf_core.models.tokenizers import load_tokenizer
from rlhf_core.preflight import preflight
from rlhf_core.preflight.probe import Loaded, probe, probe_policy

Configure = Callable[..., RunConfig]
CPU = torch.device("cpu")


def configs(vocab_size: int) -> dict[str, tuple[Any, str]]:
    import transformers as t

    sizes: dict[str, Any] = {**SMALL, "vocab_size": vocab_size}
    decoder: dict[str, Any] = {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "vocab_size": vocab_size,
        "is_encoder_decoder": False,
        "is_decoder": True,
    }
    mamba = t.MambaConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, state_size=8)
    rwkv = t.RwkvConfig(vocab_size=vocab_size, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    chunked = t.Llama4TextConfig(
        **sizes,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
        attention_chunk_size=8,
    )
    unheaded: dict[str, Any] = {k: v for k, v in sizes.items() if k != "num_attention_heads"}
    fnet = t.FNetConfig(**{**unheaded, "num_labels": 1})
    return {
        "mamba": (mamba, "AutoModelForCausalLM"),
        "rwkv": (rwkv, "AutoModelForCausalLM"),
        "positions without padding": (t.BartConfig(**decoder), "AutoModelForCausalLM"),
        "chunked attention": (chunked, "AutoModelForCausalLM"),
        "window": (t.MistralConfig(**sizes, num_key_value_heads=1, sliding_window=8), "AutoModelForCausalLM"),
        "both ways": (t.BertConfig(**sizes, is_decoder=True), "AutoModelForCausalLM"),
        "unmasked padding": (fnet, "AutoModelForSequenceClassification"),
    }


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, tokenizer = tmp_path_factory.mktemp("probed"), load_tokenizer(str(tiny.policy), field="x")

    def make(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            config, auto_class = configs(len(tokenizer))[name]
            save_random(config, auto_class, folder, tokenizer)
        return folder

    return make


@pytest.mark.parametrize("name", ["mamba", "rwkv", "positions without padding"])
def test_an_architecture_that_decodes_otherwise_than_it_reads_is_refused(
    name: str, made: Callable[[str], Path], tiny_config: Configure
) -> None:
    run = tiny_config([f"policy.model={made(name)}", "prompts.max_len=20"])
    plan = preflight(run)
    with pytest.raises(UserError) as caught:
        probe(run, plan)
    (problem,) = caught.value.problems
    assert "decoding from a cache, with prompts padded on the left" in problem


@pytest.mark.parametrize("name", ["chunked attention", "window"])
def test_attention_that_is_cut_off_is_right(name: str, made: Callable[[str], Path], tiny_config: Configure) -> None:
    """Rows are longer than chunk and window; the judge is one iteration against transformers, a row at a time."""
    from transformers import AutoModelForCausalLM

    folder = made(name)
    run = tiny_config([f"policy.model={folder}", "prompts.max_len=20", "generation.max_new_tokens=20"])
    assert any("decoding" in note for note in probe(run, preflight(run)))
    bench = Bench.of(run)
    prompts = bench.prompts().batch
    rollouts = bench.rollouts(prompts).batch
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, row in enumerate(rollouts.prompt_rows.tolist()):
        prompt = prompts.tokens_QP[row][prompts.mask_QP[row]]
        response = rollouts.tokens_BR[i][rollouts.response_mask_BR[i]]
        with torch.no_grad():
            logits = plain(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(
            rollouts.logprobs_BR[i][rollouts.response_mask_BR[i]], expected, rtol=1e-4, atol=1e-4
        )


def test_a_reward_model_that_reads_padding_is_refused(made: Callable[[str], Path], tiny_config: Configure) -> None:
    """FNet mixes tokens by a Fourier transform of the whole padded row."""
    run = tiny_config([f"reward.components.0.model={made('unmasked padding')}", "policy.critic.init=policy"])
    with pytest.raises(UserError, match="architecture 'fnet' does not mask padding"):
        probe(run, preflight(run))


def test_every_problem_is_told_at_once(made: Callable[[str], Path], tiny_config: Configure) -> None:
    run = tiny_config(
        [
            f"policy.model={made('mamba')}",
            f"reward.components.0.model={made('unmasked padding')}",
            "policy.critic.init=policy",
            "prompts.max_len=20",
        ]
    )
    with pytest.raises(UserError) as caught:
        probe(run, preflight(run))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("where", ["policy", "reward"])
def test_a_weight_that_is_not_finite_is_found(where: str, tiny: Any, tmp_path: Path, tiny_config: Configure) -> None:
    folder = shutil.copytree(getattr(tiny, where), tmp_path / where)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    key = "policy.model" if where == "policy" else "reward.components.0.model"
    run = tiny_config([f"{key}={folder}"])
    with pytest.raises(UserError, match="NaN or infinite"):
        probe(run, preflight(run))


def test_a_score_that_overflows_is_found_and_is_a_note_where_it_may_fail(
    tiny: Any, tmp_path: Path, tiny_config: Configure
) -> None:
    folder = shutil.copytree(tiny.reward, tmp_path / "reward")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    overrides = [f"reward.components.0.model={folder}", "policy.critic.init=policy"]
    run = tiny_config(overrides)
    with pytest.raises(UserError, match="for a plain question and answer"):
        probe(run, preflight(run))
    run = tiny_config([*overrides, "reward.components.0.on_error=drop"])
    assert any("for a plain question and answer" in note for note in probe(run, preflight(run)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy.dtype=bfloat16"],
        ["policy.lora.rank=4"],
        ["policy.critic.kind=shared"],
        ["policy.critic.init=reward", "policy.gradient_checkpointing=true"],
        ["policy.critic.init=zero", "frozen_models=disk"],
    ],
)
def test_a_sound_config_passes_and_nothing_moves(overrides: list[str], tiny_config: Configure) -> None:
    run = tiny_config(overrides)
    plan, loaded = preflight(run), Loaded()
    before = torch.get_rng_state()
    notes = probe(run, plan, loaded)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(notes) == 2
    assert loaded.trainer is not None
    assert loaded.trainer.digest() == Bench.of(run).trainer.digest()
    assert all(p.grad is None for _, p in loaded.trainer.actor_critic.named_parameters())
    assert (loaded.reference is not None) == (run.frozen_models == "keep")


def test_a_run_goes_on_with_what_the_probe_has_loaded(
    tiny_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_core.models import frozen, language_model
    from tasks.lifecycle.start import start_run
    from tasks.session.session import open_session

    run = tiny_config(["reference.dtype=bfloat16"])
    start_run(run, str(tmp_path / "run"))

    def load(*_: object, **__: object) -> None:
        pytest.fail("loaded again")

    for module in (frozen, language_model):
        monkeypatch.setattr(module, "load_transformers_model", load)
    session = open_session(str(tmp_path / "run"))
    assert session.policy.trainer(0).iteration == 0
    assert session.models.reference.dtype is torch.bfloat16
    assert len(session.models.reward_components) == 1


def test_nothing_is_written_where_the_probe_refuses(
    made: Callable[[str], Path], tiny_config: Configure, tmp_path: Path
) -> None:
    from tasks.lifecycle.start import start_run

    run = tiny_config([f"policy.model={made('mamba')}", "prompts.max_len=20"])
    with pytest.raises(UserError, match="decoding from a cache"):
        start_run(run, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_failing_disk_is_not_called_a_mistake_of_the_config(
    tiny_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written by a probe, and what the operating system says while it reads is passed on as it is."""
    run = tiny_config([])
    plan = preflight(run)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for writer in ("transformers.PretrainedConfig.save_pretrained", "tempfile.mkdtemp", "pathlib.Path.write_text"):
        monkeypatch.setattr(writer, full)
    probe(run, plan)
    monkeypatch.setattr("rlhf_core.preflight.probe.load_reference", full)
    with pytest.raises(OSError, match="No space left"):
        probe(run, plan)


def test_distances_by_hand() -> None:
    """A model whose state is the number of tokens before, kept or lost; and one that adds what stands beside it."""

    def alone(row: list[int]) -> torch.Tensor:
        return torch.arange(1.0, len(row) + 1)[:, None]

    def together(rows: PackedRows) -> torch.Tensor:
        return rows.positions_T[:, None] + 1.0

    rows = [[1, 2, 3, 4, 5], [6, 7, 8]]
    assert row_distance(together, alone, rows) == 0.0
    assert row_distance(lambda r: together(r) + len(r.lens_B) - 1, alone, rows) == 1.0
    assert causal_distance(alone, rows[0]) == 0.0
    assert causal_distance(lambda row: alone(row) * len(row), rows[0]) == 1.5

    class Counting:
        compact_below, steps_between_checks = 0.0, 1

        def __init__(self, prompts: list[list[int]], *, loses: bool) -> None:
            lengths = [1.0 if loses else float(len(p)) for p in prompts for _ in range(2)]
            self.hidden_bD = torch.tensor(lengths)[:, None]

        def select(self, keep: torch.Tensor) -> None:
            self.hidden_bD = self.hidden_bD[keep]

        def advance(self, tokens_b: torch.Tensor) -> None:
            assert len(tokens_b) == len(self.hidden_bD)
            self.hidden_bD = self.hidden_bD + 1

    def distance_of(loses: bool) -> float:
        return decoding_distance(
            lambda prompts: cast("Any", Counting(cast("Any", prompts), loses=loses)), alone, rows, 2
        )

    assert distance_of(loses=False) == 0.0
    assert distance_of(loses=True) == pytest.approx(2 / 3)


def test_one_folder_alone(tiny: Any) -> None:
    model = LanguageModel.load(str(tiny.policy), dtype="float32", device=CPU, trainable=True)
    found = probe_policy(model, list(range(5, 40)), longest=40, name="policy.model")
    assert set(found) == {"rows", "decoding"}
    assert max(found.values()) < ROW_TOLERANCE[torch.float32] / 10
