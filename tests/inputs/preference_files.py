"""Preference pairs as people bring them, each with the prompt that is right, stated by hand."""

from __future__ import annotations

from typing import Any

from inputs.prompt_files import ASKED, Brought, answer, lines, user

CHATML = "<|im_start|>user\nIs it far?<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nIs it far?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
ENDS = {
    "chatml": CHATML,
    "two turns of chatml": CHATML + "Yes.<|im_end|>\n" + CHATML,
    "chatml that quotes hh": CHATML.replace("far", "\n\nHuman: a\n\nAssistant: b"),
    "llama2": "<s>[INST] Is it far? [/INST]",
    "two turns of mistral": "<s>[INST] Is it far? [/INST] Yes.</s>[INST] How far? [/INST]",
    "llama3": LLAMA3,
    "gemma": "<bos><start_of_turn>user\nIs it far?<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<|user|>\nIs it far?</s>\n<|assistant|>\n",
    "phi3": "<|user|>\nIs it far?<|end|>\n<|assistant|>\n",
    "phi4": "<|im_start|>user<|im_sep|>Is it far?<|im_end|><|im_start|>assistant<|im_sep|>",
    "hh": "\n\nHuman: Is it far?\n\nAssistant:",
    "two turns of hh": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it far?\n\nAssistant:",
    "one newline": "Human: Is it far?\nAssistant:",
    "user and assistant": "User: Is it far?\nAssistant:",
    "vicuna": "A chat with a helpful AI. USER: Hi ASSISTANT: Hello.</s>USER: Is it far? ASSISTANT:",
    "alpaca": "Below is an instruction.\n\n### Instruction:\nIs it far?\n\n### Response:\n",
    "question": "### Question:\nIs it far?\n\n### Answer:\n",
    "guanaco": "### Human: Is it far?### Assistant:",
    "phi2": "Instruct: Is it far?\nOutput:",
    "q and a": "Q: Is it far?\nA:",
    "question and answer": "Question: Choose one.\nA: red\nB: blue\nAnswer:",
    "response alone": "Is it far?\n### Response:\n",
    "assistant alone": "Is it far?\nAssistant:",
    "output in an alpaca": "### Instruction:\nAdd.\n### Output: JSON\n### Input:\n1 2\n\n### Response:\n",
    "tldr": "SUBREDDIT: r/hiking\nPOST: It was far.\nTL;DR:",
    "deepseek": "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Is it far?<\uff5cAssistant\uff5c>",
}
"""Where a prompt ends in each format; the answers of both sides begin with the same words."""
NOT_MARKED = {
    "choice": "Choose one.\nA: red\nB: blue\nWhich?",
    "examples": "Add.\nInput: 1 2\nOutput: 3\nInput: 2 2\nWhat is it?",
    "markdown": "Add 1 and 2.\n\n### Output\n\nJSON, please.",
    "markdown format": "Add 1 and 2.\n\n### Output format: JSON\n\nThank you.",
}
"""Questions that hold what is a mark elsewhere."""
FROM_PAIRS = {"from_preferences": True}


def pair(start: Any, ours: str = "good", theirs: str = "bad", **more: Any) -> dict[str, Any]:
    return {**more, "chosen": f"{start}{ours}", "rejected": f"{start}{theirs}"}


def chat_pair(asked: str, **more: Any) -> dict[str, Any]:
    return {**more, "chosen": [user(asked), answer("x")], "rejected": [user(asked), answer("y")]}


SHARE = "prompts are what chosen and rejected share, up to the answer"
BESIDE = "the column 'prompt' beside chosen and rejected is not the prompt: the pair decides"
HH = ENDS["hh"]
PAIRS = [
    *(
        Brought(
            f"{name}.jsonl",
            lines(pair(end, " Yes, it is far", " Yes, it is near")),
            [end],
            [SHARE],
            knobs=FROM_PAIRS,
        )
        for name, end in ENDS.items()
    ),
    *(
        Brought(
            f"{name}.jsonl",
            lines(pair(f"{asked} ", "The first", "No, the second")),
            [asked],
            [SHARE, "nothing marks"],
            knobs=FROM_PAIRS,
        )
        for name, asked in NOT_MARKED.items()
    ),
    Brought(
        "quotes.jsonl", lines(pair(HH, " a\n\nAssistant: b c", " a\n\nAssistant: b d")), [HH], [SHARE], knobs=FROM_PAIRS
    ),
    Brought("prefix.jsonl", lines(pair(HH, " Yes", " Yes, very")), [HH], [SHARE], knobs=FROM_PAIRS),
    Brought(
        "words.jsonl",
        lines(pair("2 + 2 is ", "four", "five")),
        ["2 + 2 is"],
        [
            f"{SHARE} (no marking 1)",
            "nothing marks where the answer begins in 1 pair, so their prompt is the shared words",
        ],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "whole.jsonl",
        lines(pair("Is it far? Yes", "", ", very")),
        ["Is it far?"],
        [SHARE, "nothing marks"],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "no_end.jsonl",
        lines(pair("It is far", "", " away")),
        refused="nothing marks where its answer begins",
        knobs=FROM_PAIRS,
    ),
    Brought(
        "asked_apart.jsonl",
        lines(pair("\n\nHuman: Is it ", "far?\n\nAssistant: Yes", "near?\n\nAssistant: Yes")),
        refused="chosen and rejected part before their first answer",
        knobs=FROM_PAIRS,
    ),
    Brought(
        "some_bad.jsonl",
        lines(
            pair(HH), pair(HH, "a", "a"), {"chosen": "yes", "rejected": None}, pair(f"{HH} 2\n\nHuman: 3\n\nAssistant:")
        ),
        [HH, f"{HH} 2\n\nHuman: 3\n\nAssistant:"],
        [
            "2 of 4 pairs are dropped (prompts.bad_pairs: drop), the first is line 2: chosen and rejected are the same",
            SHARE,
        ],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "some_refused.jsonl",
        lines(pair(HH), pair(HH, "a", "a")),
        refused="line 2: chosen and rejected are the same",
        knobs={**FROM_PAIRS, "bad_pairs": "refuse"},
    ),
    Brought("all_bad.jsonl", lines(pair(HH, "a", "a")), refused="chosen and rejected are the same", knobs=FROM_PAIRS),
    Brought(
        "answers_without_prompts.jsonl",
        lines(pair("The ", "cat", "dog"), pair("", "Yes", "No"), pair("", "One", "Two")),
        refused="2 of 3 pairs show no prompt",
        knobs=FROM_PAIRS,
    ),
    Brought(
        "answers_beside_a_question.jsonl",
        lines(pair("The ", "cat", "dog", question="Who?")),
        refused="has the column 'question' beside chosen and rejected",
        knobs=FROM_PAIRS,
    ),
    Brought(
        "ultrafeedback.jsonl",
        lines(chat_pair("Is it far?", prompt="Is it far?")),
        ASKED[:1],
        [SHARE, BESIDE],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "without_the_knob.jsonl",
        lines(chat_pair("Is it far?", prompt="Is it far?")),
        ["Is it far?"],
        ["set prompts.from_preferences: true to take the prompt that they share"],
    ),
    Brought(
        "rm_static.jsonl",
        lines({"prompt": HH, "chosen": " Yes, it is far", "rejected": " Yes, it is near"}),
        [HH],
        ["prompts are of the column 'prompt': chosen and rejected hold answers alone (line 1: chosen is ' Yes"],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "explicit_chats.jsonl",
        lines({"prompt": ASKED[0], "chosen": [answer("Yes")], "rejected": [answer("No")]}),
        ASKED[:1],
        ["chosen and rejected hold answers alone (line 1: chosen is 'Yes')"],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "one_message_each.jsonl",
        lines(
            {
                "conversations": [{"from": "human", "value": "Is it far?"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            }
        ),
        ASKED[:1],
        ["hold answers alone (line 1: chosen is 'Yes')", "'human', which are read as of 'user'"],
        knobs={**FROM_PAIRS, "column": "conversations"},
    ),
    Brought(
        "orca.jsonl",
        lines({"system": "Be brief.", "question": "Is it far?", "chosen": "Yes", "rejected": "No"}),
        refused="has the column 'question' beside chosen and rejected, which share no prompt",
        knobs=FROM_PAIRS,
    ),
    Brought(
        "orca_named.jsonl",
        lines({"system": "Be brief.", "question": "Is it far?", "chosen": "Yes", "rejected": "No"}),
        ["Is it far?"],
        ["chosen and rejected hold answers alone", "the column 'system' beside it is not part of the prompt"],
        knobs={**FROM_PAIRS, "column": "question"},
    ),
    Brought(
        "a_side_as_prompt.jsonl",
        lines(pair("Is it ", "far", "near")),
        ["Is it far"],
        ["what it holds is the prompt, its answer included"],
        knobs={"column": "chosen"},
    ),
    Brought(
        "mostly_answers.jsonl",
        lines(
            {"prompt": HH, "chosen": " Yes", "rejected": " No"},
            {"prompt": f"{HH} x", "chosen": " One", "rejected": " Two"},
            pair(f"{HH} y\n\nHuman: z\n\nAssistant:", prompt=f"{HH} y"),
        ),
        [HH, f"{HH} x", f"{HH} y"],
        ["hold answers alone", "2 prompts hold text behind the mark"],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "mostly_pairs.jsonl",
        lines(pair(HH, prompt="Hi"), pair(f"{HH} x\n\nHuman: y\n\nAssistant:", prompt="Hi"), pair("", prompt="Hi")),
        [HH, f"{HH} x\n\nHuman: y\n\nAssistant:"],
        ["1 of 3 pairs are dropped", SHARE, BESIDE],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "prompt_begins_the_pair.jsonl",
        lines(pair("Is it far? ", "Yes, it is far", "Yes, it is near", prompt="Is it far?")),
        ["Is it far?"],
        [f"{SHARE} (the column beside them 1)", BESIDE],
        knobs=FROM_PAIRS,
    ),
    Brought("bare_beside_hh.jsonl", lines(pair(HH, prompt="Is it far?")), [HH], [SHARE, BESIDE], knobs=FROM_PAIRS),
    Brought(
        "earlier_turns.jsonl",
        lines(
            {
                "chosen": [user("Hi"), answer("Ho"), user("Is it far?"), answer("x")],
                "rejected": [user("Hi"), answer("Ho"), user("Is it far?"), answer("y")],
            }
        ),
        [[user("Hi"), answer("Ho"), user("Is it far?")]],
        [SHARE],
        knobs=FROM_PAIRS,
    ),
    Brought(
        "twice.jsonl", lines(pair(HH), pair(HH)), [HH], [SHARE, "1 repeated prompt of preference"], knobs=FROM_PAIRS
    ),
]
