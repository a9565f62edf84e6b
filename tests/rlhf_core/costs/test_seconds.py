"""Terms of the cost model, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_workload import MODEL, SHAPE, WORK

from rlhf_core.costs.hardware import Hardware, parse_hardware
from rlhf_core.costs.operations import Models, stage_operations
from rlhf_core.costs.seconds import TIMED_STAGES, activation_numbers, seconds_of, stage_terms
from rlhf_core.costs.workload import Workload

H200 = parse_hardware("1xH200")
PEAK, BANDWIDTH = 989e12, 4.8e12


def terms(work: Workload = WORK, hardware: Hardware = H200, threads: int = 4) -> dict[str, dict[str, float]]:
    return stage_terms(work, hardware, threads)


def test_products_are_the_counted_operations() -> None:
    """All but the value heads': 4 prompts of 3 tokens, two responses of 5 each, all of them in two minibatches."""
    work = replace(WORK)
    counted = stage_operations(
        Models(SHAPE, SHAPE, None), dict.fromkeys(range(4), 3), [(i % 4, 5) for i in range(8)], epochs=1
    )
    values = 8 * SHAPE.scalars(5)
    expected = {
        "generate": counted["generate"] - values,
        "score_rewards": counted["score_rewards"] - 8 * SHAPE.scalars(1),
        "reference_logprobs": counted["reference_logprobs"],
        "ppo_update": counted["ppo_update"] - 3 * values,
    }
    found = terms(work)
    assert set(found) == set(TIMED_STAGES)
    for stage, operations in expected.items():
        assert found[stage]["products"] * PEAK == pytest.approx(operations), stage


def test_a_step_of_decoding_reads_all_weights_and_what_is_cached() -> None:
    found = terms()["generate"]
    assert found["weights"] * BANDWIDTH == pytest.approx(5 * (1000 + 50 * 8) * 2)  # five steps behind the first token
    contexts = 4 + 5 + 6 + 7  # of a row whose prompt has three tokens, four tokens are read
    assert found["cache"] * BANDWIDTH == pytest.approx(8 * contexts * 2 * 16 * 2)
    assert found["sampling"] * BANDWIDTH == pytest.approx(8 * 5 * 50 * 4)
    assert (found["decoding_calls"], found["start"]) == (10, 1)
    in_groups = terms(replace(WORK, decoding_rows=3))["generate"]
    assert (in_groups["decoding_calls"], in_groups["start"]) == (30, 3)
    assert in_groups["cache"] == found["cache"]


def test_an_update_moves_the_optimizer_and_digests_what_it_trained() -> None:
    found = terms()["ppo_update"]
    assert found["optimizer"] * BANDWIDTH == pytest.approx(2 * 36 * 1400)
    assert found["digest"] == pytest.approx(4 * 1400 / (1e9 * 4))
    assert found["traffic"] * BANDWIDTH == pytest.approx(2 * 3 * 2 * 4 * 7 * 2 * activation_numbers(SHAPE) * 2)
    assert activation_numbers(SHAPE) == 4 * 8 + 2 * 8 + 16 + 3 * 32
    assert "collectives" not in found


def test_recomputation_is_a_further_forward_pass_and_lora_spares_one() -> None:
    def products(work: Workload) -> float:
        return terms(work)["ppo_update"]["products"]

    trunk = 8 * SHAPE.trunk(7) / PEAK
    assert products(replace(WORK, recomputes=True)) - products(WORK) == pytest.approx(trunk)
    assert products(WORK) - products(WORK.with_lora(1)) == pytest.approx(trunk + 8 * SHAPE.logits(5) / PEAK)


def test_collectives_of_a_micro_batch() -> None:
    """Float32 weights are gathered twice, gradients scattered once; of eight devices each hands on 7/8."""
    whole = replace(WORK, prompts=32, minibatch_rows=32, micro_batch_rows=32)
    found = terms(whole.on(8), parse_hardware("8xH100"))["ppo_update"]
    assert found["collectives"] == pytest.approx(2 * 3 * 4 * 1400 * 7 / 8 / 450e9)
    split = terms(replace(whole, micro_batch_rows=1).on(8), parse_hardware("8xH100"))["ppo_update"]
    assert split["collectives"] == pytest.approx(4 * found["collectives"])


def test_a_separate_critic_reads_and_learns_too() -> None:
    alone, both = terms(), terms(replace(WORK, critic=MODEL))
    assert both["generate"]["products"] > alone["generate"]["products"]
    assert both["ppo_update"]["optimizer"] == pytest.approx(2 * alone["ppo_update"]["optimizer"])
    assert both["reference_logprobs"] == alone["reference_logprobs"]


def test_two_stages_side_by_side_have_half_of_a_cpu_each() -> None:
    plain = replace(MODEL, dtype="float32")
    work = replace(WORK, policy=plain, reference=plain, rewards=(plain,))
    found = terms(work, parse_hardware("CPU2"))["score_rewards"]
    assert found["products"] == pytest.approx(2 * 8 * SHAPE.trunk(8) / 147e9)


def test_seconds_are_the_sum_of_terms_times_coefficients() -> None:
    assert seconds_of({"products": 2.0, "stage": 1}, {"products": 3.0, "stage": 0.5, "cache": 9.0}) == 6.5
    with pytest.raises(KeyError):
        seconds_of({"products": 2.0}, {})
