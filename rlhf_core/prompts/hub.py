"""Rows of a `datasets` folder or of a dataset of the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from rlhf_core.contracts.config import PromptsConfig
from rlhf_core.contracts.errors import UserError
from rlhf_core.prompts.foreign import check_dataset_folder
from rlhf_core.prompts.readers import Choose, Rows, reason, refuse_split, refuse_subset

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

    if config.source.isidentifier() and find_spec(f"datasets.packaged_modules.{config.source}"):
        raise UserError(  # load_dataset would read every file of the current folder
            f"prompts.source {config.source!r} is the name of a reader of `datasets`, not of a dataset; "
            "name a file, a folder or a dataset of the hub"
        )
    try:
        data = datasets.load_dataset(config.source, config.subset, split=config.split)
    except Exception as error:  # network, hub and readers of all formats: any exception can come out
        raise UserError(
            f"prompts.source {config.source!r} is neither a file nor a folder here, and could not be loaded "
            f"from the hub ({_asked(config)}): {reason(error)}"
        ) from error
    return _rows_of_dataset(config, cast("datasets.Dataset", data), choose)


def _rows_of_dataset(config: PromptsConfig, data: datasets.Dataset, choose: Choose) -> Rows:
    wanted = list(choose(data.column_names))
    try:
        return Rows(data.select_columns(wanted).with_format(None)[:])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"prompts.source {config.source!r} cannot be read: {reason(error)}") from error


def _asked(config: PromptsConfig) -> str:
    subset = "" if config.subset is None else f"prompts.subset {config.subset!r}, "
    return f"{subset}prompts.split {config.split!r}"
