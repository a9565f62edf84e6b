"""Draws responses with vLLM, in an environment of its own, for :mod:`rlhf_core.models.vllm_engine`, which starts it.

Prefect and vLLM ask for different versions of fastapi, so that no environment has both: this file is a program that
imports nothing of this package, and is run by the Python of an environment that has vLLM and may have nothing else.

    to it      {"do": "load", "model": FOLDER, "options": {...}}            a folder of save_pretrained; first, and
                                                                            again whenever the weights are others
               {"do": "draw", "prompts": [[...]], "seeds": [...], "max_new_tokens": 24, "temperature": 1.0,
                "eos_ids": [...]}
    from it    {"done": {"tokens": [[...]], "logprobs": [[...]]}}  or  {"failed": "what vLLM has raised"}

Lines of JSON over stdin and what was stdout; whatever vLLM prints goes to stderr. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduling is deterministic only within one process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with others
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; else it takes what there is, and fills it with zeros
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # all it needs is in the folder
}
MAX_REASON = 300
"""Characters of what vLLM has raised."""


class Engine:
    """vLLM with one model, asleep on a GPU while nobody asks: the update needs the memory."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._sleeps = False

    def load(self, *, model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Take the weights of a folder; what was cached of the old ones is forgotten.

        Args:
            model: folder with config.json and safetensors.
            options: of ``vllm.LLM``, when it begins.
        """
        if self._llm is None:
            self._begin(model, options)
            return {}
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        self._llm.reset_prefix_cache()
        return {}

    def draw(
        self,
        *,
        prompts: list[list[int]],
        seeds: list[int],
        max_new_tokens: int,
        temperature: float,
        eos_ids: list[int],
    ) -> dict[str, Any]:
        """A response to each prompt, with the log-prob of each of its tokens at this temperature.

        Args:
            prompts: B lists of token ids.
            seeds: of each response's own draws.
            max_new_tokens: length limit of a response.
            temperature: divides the logits.
            eos_ids: tokens that end a response.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports] - of the other environment

        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed,
                stop_token_ids=eos_ids,
                ignore_eos=True,  # those of the tokenizer are meant, not of the model's config
                logprobs=0,  # of the token that was drawn, and no other
                detokenize=False,
            )
            for seed in seeds
        ]
        answers = [answer.outputs[0] for answer in self._llm.generate(asked, sampling, use_tqdm=False)]
        if self._sleeps:
            self._llm.sleep(level=2)  # weights are not kept: the next ones come before they are needed
        return {
            "tokens": [list(answer.token_ids) for answer in answers],
            "logprobs": [
                [of[token].logprob for token, of in zip(answer.token_ids, answer.logprobs, strict=True)]
                for answer in answers
            ],
        }

    def _begin(self, model: str, options: dict[str, Any]) -> None:
        import torch
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self._sleeps = torch.cuda.is_available()
        own = {
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "seed": 0,
            "enable_sleep_mode": self._sleeps,
        }
        eager = not self._sleeps  # compiling takes longer than it gains on a CPU
        self._llm = LLM(model=model, **{"enforce_eager": eager, **options, **own})


def main() -> None:
    """Answer one request after the other."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    engine = Engine()
    while True:
        request = requests.get()
        do = {"load": engine.load, "draw": engine.draw}[request.pop("do")]
        try:
            answer = {"done": do(**request)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Read while vLLM computes, so that the end of whoever asks is the end of this, too."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
