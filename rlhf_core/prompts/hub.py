"""Rows of a `datasets` folder or of a dataset of the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from rlhf_core.contracts.bounds import at_most, for_file
from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import commit_of, is_commit, looks_like_hub_name, refuse_revision_of_folder, split_revision
from rlhf_core.prompts.foreign import check_dataset_folder
from rlhf_core.prompts.readers import FILE_READERS, Choose, Rows, check_num_rows, reason, refuse_split, refuse_subset

if TYPE_CHECKING:
    import datasets


def read_folder(config: PromptsConfig, path: Path, choose: Choose) -> Rows:
    """Read a folder written by ``datasets.save_to_disk``, or any that ``datasets.load_dataset`` understands.

    Args:
        config: its split, and for a folder that was not saved by `datasets` its subset.
        path: the folder.
        choose: picks the columns to read.
    Returns: the chosen columns.
    Raises:
        UserError: `datasets` cannot read it, or it has no such split.
    """
    import datasets

    check_dataset_folder(path, f"prompts.source {config.source!r}")
    folder = str(path.absolute())  # a relative one might be taken for a reader of that name, as "json"
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved:
        refuse_subset(config, "a saved dataset")
    try:
        if saved:
            data = datasets.load_from_disk(folder)
        else:
            data = datasets.load_dataset(folder, config.subset, split=config.split)
    except Exception as error:  # `datasets` raises some twenty kinds, and its readers any other
        raise UserError(
            f"prompts.source {config.source!r} is a folder that `datasets` cannot read "
            f"({_asked(config)}): {reason(error)}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise UserError(
                f"prompts.split is {config.split!r}, but prompts.source {config.source!r} has the splits "
                f"{', '.join(map(str, data))}"
            )
        data = data[config.split]
    elif saved and config.split != str(data.split):
        refuse_split(config, "a saved dataset of one split")
    return _rows_of_dataset(config, cast("datasets.Dataset", data), choose)


def read_hub(config: PromptsConfig, choose: Choose) -> Rows:
    """Read a dataset of the Hugging Face hub.

    Args:
        config: its source, subset and split.
        choose: picks the columns to read.
    Returns: the chosen columns.
    Raises:
        UserError: there is none of that name, no network, no such subset or split.
    """
    import datasets

    if _is_reader(config.source):
        raise UserError(  # load_dataset would read every file of the current folder
            f"prompts.source {config.source!r} is the name of a reader of `datasets`, not of a dataset; "
            "name a file, a folder or a dataset of the hub"
        )
    refuse_revision_of_folder(config.source, "prompts.source")
    repo, revision = split_revision(config.source)
    chosen: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        data = datasets.load_dataset(repo, config.subset, split=config.split, **chosen)
        _refuse_other_commit(cast("datasets.Dataset", data), revision)
    except Exception as error:  # network, hub and readers of all formats: any exception can come out
        raise UserError(
            f"prompts.source {config.source!r} is neither a file nor a folder here, and could not be loaded "
            f"from the hub ({_asked(config)}): {reason(error)}"
        ) from error
    return _rows_of_dataset(config, cast("datasets.Dataset", data), choose)


def pinned_source(source: str) -> str:
    """A data set of the hub with the commit that it stands for now; a file or a folder as it is.

    Raises: whatever huggingface_hub raises where the commit cannot be found out.
    """
    repo, revision = split_revision(source)
    is_file = Path(repo).suffix.lower() in FILE_READERS or Path(source).expanduser().exists() or Path(repo).exists()
    if is_file or is_commit(revision) or not looks_like_hub_name(source) or _is_reader(source):
        return source
    return f"{repo}@{commit_of(source, 'dataset')}"


def _is_reader(source: str) -> bool:
    return source.isidentifier() and find_spec(f"datasets.packaged_modules.{source}") is not None


def _refuse_other_commit(data: datasets.Dataset, revision: str | None) -> None:
    """Without network `datasets` takes whatever it has prepared last, which may be another commit than was asked."""
    prepared = {Path(str(file["filename"])).parent.name for file in data.cache_files}
    if is_commit(revision) and (other := sorted(c for c in prepared if is_commit(c) and c != revision)):
        raise ValueError(f"the hub cannot be reached, and the cache of `datasets` holds commit {other[0]}")


def _rows_of_dataset(config: PromptsConfig, data: datasets.Dataset, choose: Choose) -> Rows:
    wanted = list(choose(data.column_names))
    size = sum(Path(file["filename"]).stat().st_size for file in data.cache_files)
    try:
        check_num_rows(len(data))
        with at_most(for_file(size)):
            return Rows(data.select_columns(wanted).with_format(None)[:])
    except MemoryError:
        raise UserError(
            f"prompts.source {config.source!r} would take more than {for_file(size) >> 30} GiB of memory, or more than "
            "is free; take fewer rows"
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"prompts.source {config.source!r} cannot be read: {reason(error)}") from error


def _asked(config: PromptsConfig) -> str:
    subset = "" if config.subset is None else f"prompts.subset {config.subset!r}, "
    return f"{subset}prompts.split {config.split!r}"
