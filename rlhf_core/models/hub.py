"""From the name of a model to the folder that holds it: a folder as it is, or one commit of a hub repository.

Everything that reads a model, an adapter or a tokenizer reads it from :func:`folder_of`. So every check that knows
folders (data only, sizes, digests, templates) holds for models of the hub, and no library asks the hub by itself: it
would take the newest commit, and another one at its next look.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

from rlhf_core.contracts.errors import UserError
from rlhf_core.contracts.hub import commit_of, is_commit, quietly, refuse_revision_of_folder, split_revision

MARKS: Final = (
    ".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".merges", ".spm", ".bpe", ".codes",
)  # fmt: skip
"""Suffixes of what libraries read of a model's folder; weights as pickle and code are left out."""
TEMPLATES: Final = "additional_chat_templates"
"""The one folder inside that they read."""
_SMALL: Final = (*(f"*{mark}" for mark in MARKS if mark != ".safetensors"), f"{TEMPLATES}/*.jinja")
_WEIGHTS: Final = ("model.safetensors", "model-*.safetensors", "adapter_model.safetensors")
"""What from_pretrained takes; a repository may hold the same weights again, as consolidated.safetensors, say."""
_OTHER_FOLDERS: Final = ("[!a]*/*", "a[!d]*/*")
"""Everything in folders, but for TEMPLATES: patterns of the hub match a slash by a star."""


def folder_of(name: str, field: str, *, with_weights: bool = False, offline: bool = False) -> Path:
    """The folder of a model, adapter or tokenizer: as it is named, or a commit's in the hub's cache.

    Args:
        name: a folder, or ``owner/name@revision`` of the hub; without a revision the newest commit.
        field: named in errors.
        with_weights: fetch weights as well; else configs, tokenizers and templates alone.
        offline: take what is in the cache, and ask nobody.
    Returns: a folder that exists; for a hub id its last part is the commit.
    Raises: UserError naming ``field`` if there is no such folder or repository, or it cannot be had here.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    refuse_revision_of_folder(name, field)
    repo, revision = split_revision(name)
    if folder.exists() or name.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise UserError(f"{field} {name!r} is not a folder here; give a model folder or a hub id")
    try:
        if offline:
            return _cached(repo, revision, with_weights=with_weights)
        commit = commit_of(name, "model")
        folder = _snapshot(_cache(), repo, commit, with_weights=with_weights)
        if not folder.is_dir():  # somebody has emptied the cache since
            _snapshot.cache_clear()
            folder = _snapshot(_cache(), repo, commit, with_weights=with_weights)
        return folder
    except Exception as error:  # of the network, of the hub, of the disk
        reason = str(error).strip().split("\n")[0]
        if offline:
            where = "is neither a folder here nor in the hub's cache"
        elif is_commit(revision):
            where = "is not in the hub's cache at that commit, and cannot be fetched"
        else:
            where = "is neither a model folder nor a hub id that loads"
        raise UserError(f"{field} {name!r} {where}: {reason}") from None


def pinned_name(name: str) -> str:
    """A hub id with the commit that it stands for now; a folder as it is.

    Raises: whatever huggingface_hub raises where the commit cannot be found out.
    """
    if Path(name).expanduser().exists() or is_commit(split_revision(name)[1]):
        return name
    repo, _ = split_revision(name)
    if Path(repo).exists() or name.startswith((".", "/", "~")) or repo.count("/") > 1:
        return name  # refused where it is loaded
    return f"{repo}@{commit_of(name, 'model')}"


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that libraries read, by their names; then its further chat templates."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in MARKS]
    return files + sorted((folder / TEMPLATES).glob("*.jinja"))


def stored_names(name: str, folder: Path) -> list[str]:
    """Names of the files at the top of a folder; for a hub id also of those that were not fetched.

    Args:
        name: as it was named.
        folder: that :func:`folder_of` has found.
    """
    there = [file.name for file in folder.iterdir()]
    if Path(name).expanduser().is_dir():
        return there
    repo, _ = split_revision(name)
    return sorted({*there, *_listed(_cache(), repo, folder.name)})


@functools.lru_cache(maxsize=256)
def _snapshot(cache: str, repo: str, commit: str, *, with_weights: bool) -> Path:  # noqa: ARG001 - part of the key
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, *(_WEIGHTS if with_weights else ())]
    if with_weights:
        folder = Path(
            snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=[*_OTHER_FOLDERS])
        )
        if not any(folder.glob("*.safetensors")):  # by names of their own
            snapshot_download(
                repo, revision=commit, allow_patterns=["*.safetensors"], ignore_patterns=[*_OTHER_FOLDERS]
            )
        return folder
    with quietly():
        return Path(
            snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=[*_OTHER_FOLDERS])
        )


def _cached(repo: str, revision: str | None, *, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, *(_WEIGHTS if with_weights else ())]
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=patterns,
            ignore_patterns=[*_OTHER_FOLDERS],
        )
    )


@functools.lru_cache(maxsize=256)
def _listed(cache: str, repo: str, commit: str) -> tuple[str, ...]:  # noqa: ARG001 - part of the key
    """Names at the top of a repository; none where the hub cannot be asked."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=commit)
    except Exception:  # the network is gone: what is in the cache counts
        return ()
    return tuple(name for name in names if "/" not in name)


def _cache() -> str:
    """Where huggingface_hub keeps repositories now."""
    from huggingface_hub import constants

    cache: Any = constants.HF_HUB_CACHE
    return str(cache)
