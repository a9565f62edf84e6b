"""A bundle that was unpacked, as the run that it was taken from: everything in it is checked before it is used."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pyarrow as pa

from rlhf_core.contracts.artifacts import check_folder, read_artifact
from rlhf_core.contracts.errors import IntegrityError
from rlhf_core.contracts.ipc_sizes import batch_message, decompressed_bytes
from rlhf_core.contracts.run_folder import RunFolder
from rlhf_core.contracts.stage_graph import SCHEMAS, STAGES
from rlhf_core.replay.bundles import RUN, BundleRecord, unpack_bundle

_SAMPLE = re.compile(r"i[0-9]{6,}-p[0-9]{6,}-s[0-9]+")


def open_bundle(path: Path, folder: Path) -> tuple[RunFolder, BundleRecord]:
    """Unpack a bundle and check what it holds.

    Args:
        path: the file.
        folder: an empty one.
    Returns: the run, with the config as it was (its places are those of another machine), and the record.
    Raises: UserError if it is no bundle; IntegrityError if it, or anything in it, is damaged.
    """
    record = unpack_bundle(path, folder)
    run = RunFolder.open(folder / RUN)
    manifests = run.manifests(record.iteration)
    if missing := [stage for stage in STAGES if stage not in manifests]:
        raise IntegrityError(f"{path} does not hold {missing[0]} of iteration {record.iteration}")
    for stage, manifest in manifests.items():
        _check_plain(run.path / manifest.artifact.path, stage)
        table = read_artifact(run.path, manifest.artifact)
        if "sample_id" in table.column_names and not all(map(_SAMPLE.fullmatch, table["sample_id"].to_pylist())):
            raise IntegrityError(f"{path} holds a sample_id in {manifest.artifact.path} that no run writes")
    run.state_before(record.iteration)
    if record.with_models:
        check_folder(run.checkpoint_path(record.iteration))
    return run, record


def verify_bundle(path: Path) -> BundleRecord:
    """Check every seal and digest of a bundle. Raises as :func:`open_bundle`."""
    with tempfile.TemporaryDirectory(prefix="rlhf-verify-") as folder:
        return open_bundle(path, Path(folder))[1]


def _check_plain(path: Path, stage: str) -> None:
    """Refuse an artifact that would grow when it is read: a stage writes its tables as they are."""
    try:
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            fits, num_batches = reader.schema.equals(SCHEMAS[stage]), reader.num_record_batches
        with path.open("rb") as file:
            needed = [decompressed_bytes(batch_message(file, index)) for index in range(num_batches)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} of the bundle is not a valid Arrow file: {error}") from None
    if not fits or sum(needed) > path.stat().st_size:
        raise IntegrityError(f"{path.name} of the bundle is not what {stage} writes: another schema, or compressed")
