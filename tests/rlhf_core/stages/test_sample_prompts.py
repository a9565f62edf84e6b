from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from iteration import START, Bench

from rlhf_core.contracts.batches import Prompts, StageResult
from rlhf_core.contracts.config import RunConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.loop_state import Cursor
from rlhf_core.models.tokenizers import load_policy_tokenizer
from rlhf_core.prompts.sources import load_prompt_set
from rlhf_core.stages.sample_prompts import sample_prompts

Configure = Callable[..., RunConfig]


def epoch_of(bench: Bench, batches: int) -> tuple[list[list[int]], Cursor]:
    cursor, rows = Cursor(), []
    for _ in range(batches):
        result = bench.prompts(cursor)
        rows.append(list(result.batch.prompt_ids))
        cursor = Cursor(**result.state["cursor"])
    return rows, cursor


def test_an_epoch_shows_every_prompt_once_then_another_order(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    rows, cursor = epoch_of(bench, 10)
    first, second = list(chain(*rows[:5])), list(chain(*rows[5:]))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert cursor == Cursor(epoch=1, position=40)


def test_an_incomplete_batch_at_the_end_of_an_epoch_is_left_out(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config(["prompts.batch_size=12"]))
    rows, cursor = epoch_of(bench, 4)
    assert [len(set(row)) for row in rows] == [12] * 4
    assert cursor == Cursor(epoch=1, position=12)


def test_the_order_comes_from_the_seed_and_may_be_the_sources(tiny_config: Configure) -> None:
    ids = [list(Bench.of(tiny_config([o])).prompts().batch.prompt_ids) for o in ("seed=1", "seed=1", "seed=2")]
    assert ids[0] == ids[1] != ids[2]
    plain = Bench.of(tiny_config(["prompts.shuffle=false"])).prompts()
    assert list(plain.batch.prompt_ids) == list(range(8))


def test_tokens_decode_to_the_text(tiny_config: Configure) -> None:
    bench = Bench.of(tiny_config())
    prompts = bench.prompts().batch
    for text, tokens, mask in zip(prompts.texts, prompts.tokens_QP, prompts.mask_QP, strict=True):
        assert bench.plan.tokenizer.decode(tokens[mask].tolist()) == text


LONG = "a long text that goes on and on and never seems to end"


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    source = tmp_path / "p.jsonl"
    texts = [f"word {i}" for i in range(10)]
    texts[4:4] = [LONG, LONG]
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return source


def sample(config: RunConfig, cursor: Cursor = START) -> StageResult[Prompts]:
    return sample_prompts(
        load_prompt_set(config.prompts),
        load_policy_tokenizer(config.policy.model, None),
        config.prompts,
        cursor=cursor,
        seed=0,
        max_prompt_len=config.prompts.max_len or 99,
    )


def test_over_long_prompts_are_truncated_left_dropped_or_refused_and_counted(
    uneven: Path, tiny_config: Configure
) -> None:
    def configured(how: str, size: int) -> RunConfig:
        settings = [f"prompts.source={uneven}", "prompts.max_len=12", "prompts.shuffle=false"]
        return tiny_config([*settings, f"prompts.over_long={how}", f"prompts.batch_size={size}"])

    cut = sample(configured("truncate_left", 12))
    assert cut.metrics["prompts/truncated"] == 2
    assert cut.batch.mask_QP.sum(dim=1).max() == 12
    tokenizer = load_policy_tokenizer(configured("drop", 2).policy.model, None)
    whole = tokenizer.encode(LONG, is_chat=False)
    assert cut.batch.tokens_QP[5].tolist() == whole[-12:]
    assert cut.batch.num_truncated[5] == len(whole) - 12

    dropped = sample(configured("drop", 8), Cursor(0, 3))  # row 3 and the six after 4 and 5 are too few: a new epoch
    assert dropped.metrics["prompts/dropped"] == 2
    assert list(dropped.batch.prompt_ids) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert dropped.state["cursor"] == {"epoch": 1, "position": 10}

    with pytest.raises(UserError, match=r"prompt 4 \(from 0\).* set prompts.over_long"):
        sample(configured("refuse", 12))


def test_a_chat_goes_through_the_policys_template_once(tiny_config: Configure, tiny: Any, tmp_path: Path) -> None:
    """Its special tokens come from the template alone, and the messages are kept for reward models."""
    policy = shutil.copytree(tiny.policy, tmp_path / "policy")
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|pad|>{% endfor %}<assistant>"
    (policy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    chats = [[{"role": "user", "content": f"The film was {word}?"}] for word in ("slow", "bright")]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    overrides = [f"policy.model={policy}", f"prompts.source={source}", "prompts.column=messages"]
    config = tiny_config([*overrides, "prompts.batch_size=2", "prompts.shuffle=false"])
    prompts = sample(config).batch
    assert list(prompts.texts) == [f"<user>The film was {word}?<|pad|><assistant>" for word in ("slow", "bright")]
    assert [list(messages) for messages in prompts.messages] == chats
    tokens = prompts.tokens_QP[0][prompts.mask_QP[0]].tolist()
    assert tokens == load_policy_tokenizer(str(policy), None).tokenizer(prompts.texts[0])["input_ids"]


def test_too_few_usable_prompts_is_one_sentence(uneven: Path, tiny_config: Configure) -> None:
    settings = [f"prompts.source={uneven}", "prompts.max_len=12", "prompts.over_long=drop", "prompts.batch_size=12"]
    with pytest.raises(UserError, match="needs 12 different ones"):
        sample(tiny_config(settings))
