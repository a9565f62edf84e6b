"""One finished run for all tests of the page. It is shared: copy it before changing anything in it."""

from __future__ import annotations

import pytest
from damage import finished_run
from tiny_world import Tiny

from rlhf_core.contracts.run_folder import RunFolder


@pytest.fixture(scope="package")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Three iterations of eight responses."""
    return RunFolder.open(finished_run(tiny, tmp_path_factory.mktemp("viewed") / "run"))
