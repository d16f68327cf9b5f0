"""Checkpoints on the Hugging Face Hub, through huggingface_hub: its cache, its offline mode.

A repository becomes the folder of its snapshot in the cache. Planning takes its JSON files and the
headers of its safetensors files, which are read over the network where the cache has not got the
file; weights come later, and only the files that some planned layer lies in.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mixedprec_plugin.checkpoint.files import file_error
from mixedprec_plugin.checkpoint.headers import CHANGED, StoredTensor, lay_out
from mixedprec_plugin.errors import CheckpointError, Problem

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# what a plan needs, and what serving and converting copy; no weights, and never a pickle
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


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

    with _reaching(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_SMALL_FILES))


def file_names(folder: Path) -> list[str]:
    """List the files of the repository that a folder of the cache is a snapshot of.

    Raises:
        CheckpointError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    repo_id, commit = _repository(folder / "model.safetensors")
    with _reaching(repo_id, commit):
        info = HfApi().model_info(repo_id, revision=commit)
    return [file.rfilename for file in info.siblings or ()]


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
    return repository_of(path.parent) is not None and not os.path.exists(path)


def read_remote_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file over the network.

    Args:
        path: where the file will lie in the cache.
    Raises:
        CheckpointError: the file cannot be reached, or is no safetensors file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    repo_id, commit = _repository(path)
    with _reaching(f"{repo_id}/{path.name}", commit):
        try:
            said = HfApi().parse_safetensors_file_metadata(repo_id, path.name, revision=commit)
            entries = sorted(said.tensors.items(), key=lambda item: item[1].data_offsets)
        except (SafetensorsParsingError, AttributeError, TypeError, RecursionError) as error:
            # only the first of these is huggingface_hub's word for it
            raise file_error(path, f"its header is malformed ({error})") from error
    header = lay_out(((name, x.dtype, x.shape) for name, x in entries), path)
    for name, entry in entries:
        # of a file that it has not got, safetensors checks nothing
        if entry.data_offsets != (header[name].start, header[name].start + header[name].num_bytes):
            raise file_error(path, f"{name!r} does not span the bytes of its dtype and shape")
    return header


def read_remote(tensor: StoredTensor, start: int, num_bytes: int) -> bytes:
    """Read some bytes of a tensor over the network; `start` counts from its first.

    Raises:
        CheckpointError: the file cannot be reached, or ends early.
    """
    import numpy as np
    from huggingface_hub import HfFileSystem

    repo_id, commit = _repository(tensor.path)
    span = tensor.span_of(num_bytes)
    with (
        _reaching(f"{repo_id}/{tensor.path.name}", commit),
        HfFileSystem().open(f"{repo_id}@{commit}/{tensor.path.name}", cache_type="none") as file,
    ):
        file.seek(8 + int.from_bytes(file.read(8), "little") + tensor.start + start * tensor.step)
        data = bytes(file.read(span))
    if len(data) < span:
        raise file_error(tensor.path, f"ends inside {tensor.name!r}", CHANGED)
    return tensor.without_gaps(np.frombuffer(data, np.uint8)).tobytes()


def fetch_if_missing(path: Path) -> None:
    """Download a file of a snapshot that the cache has not got yet.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    if not is_remote(path):
        return
    from huggingface_hub import hf_hub_download

    repo_id, commit = _repository(path)
    with _reaching(f"{repo_id}/{path.name}", commit):
        hf_hub_download(repo_id, path.name, revision=commit)


def _repository(path: Path) -> tuple[str, str]:
    repository = repository_of(path.parent)
    assert repository is not None
    return repository


@contextlib.contextmanager
def _reaching(where: str, revision: str | None) -> Iterator[None]:
    """Say of what is asked of the Hub why it cannot be had; a lost connection is httpx's error.

    A RuntimeError is httpx's of a stream, or that of hf_xet, which is not written in Python.
    """
    from httpx import HTTPError, InvalidURL

    try:
        yield
    except (HTTPError, InvalidURL, OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        at = f" at revision {revision!r}" if revision else ""
        why = f"({type(error).__name__}: {first_line})"
        what = f"cannot be fetched from the Hugging Face Hub{at} {why}"
        remedy = "check the id, the revision, the network and the token, or give a local folder"
        raise CheckpointError(Problem(where, what, remedy, "hub")) from error
