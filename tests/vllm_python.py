"""An environment of its own that has vLLM, or the double that stands in for it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

GIVEN = os.environ.get("RLHF_VLLM_PYTHON")
"""Interpreter of an environment with vLLM itself."""
DOUBLE = Path(__file__).with_name("vllm_double.py")


def vllm_python(folder: Path) -> str:
    """The interpreter that was given, or that of a new environment with the double.

    Args:
        folder: for the new environment.
    """
    if GIVEN:
        return GIVEN
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    shutil.copy(DOUBLE, packages / "vllm.py")
    told = packages / "vllm-0.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0\n")
    return str(folder / "bin" / "python")
