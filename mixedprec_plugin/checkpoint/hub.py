"""Checkpoints on the Hugging Face Hub, through huggingface_hub: its cache, its offline mode.

A repository becomes the folder of its snapshot in the cache. Planning takes its JSON files and the
headers of its safetensors files, which are read over the network where the cache has not got the
file; weights come later, and only the files that some planned layer lies in.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mixedprec_plugin.checkpoint.headers import StoredTensor, parse_header
from mixedprec_plugin.errors import CheckpointError, Problem

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# what a plan needs, and what serving and converting copy; no weights, and never a pickle
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def is_id(path: str) -> bool:
    """Whether a path that is no folder can be a repository's id."""
    return _ID.fullmatch(path) is not None


def snapshot_folder(repo_id: str, revision: str | None) -> Path:
    """Fetch the small files of a repository, or find them in the cache.

    Returns:
        the snapshot's folder in the cache; its weights may be missing.
    Raises:
        CheckpointError: there is no such repository or revision, or offline the cache lacks it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(_SMALL_FILES))
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(repo_id, revision, error) from error


def repository_of(folder: Path) -> tuple[str, str] | None:
    """Tell what a folder of the cache is a snapshot of.

    Returns:
        the repository's id and the commit; None where the folder is none of the cache's.
    Source: `.../models--ORG--NAME/snapshots/COMMIT`, huggingface_hub's manage-cache guide.
    """
    owner = folder.parent.parent
    if folder.parent.name != "snapshots" or not owner.name.startswith("models--"):
        return None
    return owner.name.removeprefix("models--").replace("--", "/", 1), folder.name


def is_remote(path: Path) -> bool:
    """Whether a file is one of a snapshot that the cache has not got yet."""
    return repository_of(path.parent) is not None and not path.exists()


def read_remote_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file over the network.

    Args:
        path: where the file will lie in the cache.
    Returns:
        tensor name -> where it will lie.
    Raises:
        CheckpointError: the file cannot be reached, or is no safetensors file.
    """
    with _opened(path) as (file, size):
        return parse_header(file, size, path)


def read_remote(path: Path, start: int, num_bytes: int) -> bytes:
    """Read a range of a file over the network.

    Raises:
        CheckpointError: the file cannot be reached.
    """
    with _opened(path) as (file, _):
        file.seek(start)
        return file.read(num_bytes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file of the Hub and its size; ranges of it are fetched as they are read."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, commit = _repository(path)
    try:
        with HfFileSystem().open(f"{repo_id}@{commit}/{path.name}", "rb") as file:
            yield cast(BinaryIO, file), int(file.size)
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(f"{repo_id}/{path.name}", commit, error) from error


def fetch_if_missing(path: Path) -> None:
    """Download a file of a snapshot that the cache has not got yet.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    if not is_remote(path):
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, commit = _repository(path)
    try:
        hf_hub_download(repo_id, path.name, revision=commit)
    except (HfHubHTTPError, OSError) as error:
        raise _unreachable(f"{repo_id}/{path.name}", commit, error) from error


def _repository(path: Path) -> tuple[str, str]:
    repository = repository_of(path.parent)
    assert repository is not None
    return repository


def _unreachable(what: str, revision: str | None, error: Exception) -> CheckpointError:
    first_line = str(error).strip().partition("\n")[0]
    at = f" at revision {revision!r}" if revision else ""
    return CheckpointError(
        Problem(
            what,
            f"cannot be had from the Hugging Face Hub{at} ({type(error).__name__}: {first_line})",
            "check the id, the revision, the network and the token, or give a local folder",
            "hub",
        )
    )
