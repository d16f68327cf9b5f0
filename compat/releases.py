"""SGLang's releases on the package index, and their wheels in the cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from compat.sources import Sources, read_folder, read_wheel
from mixedprec_plugin.resources import cache_root

FIRST = "0.5.11"
# from before there were plugins: only the constructors are looked at
CONSTRUCTORS_ONLY = "0.4.7"


def cache_dir() -> Path:
    """Where wheels are kept."""
    return cache_root() / "sglang-wheels"


def listed_versions() -> list[str]:
    """Final and post releases from FIRST on that pip's index offers, oldest first.

    Raises:
        RuntimeError: pip failed; with what it said.
    """
    said = _pip("index", "versions", "sglang")
    found = re.search(r"Available versions: (.*)", said)
    if found is None:
        raise RuntimeError(f"pip index versions sglang: names no versions: {said!r}")
    versions = {Version(text) for text in found[1].split(",")}
    wanted = [v for v in versions if v >= Version(FIRST) and not v.is_prerelease]
    return [str(version) for version in sorted(wanted)]


def never_released(versions: list[str]) -> list[str]:
    """Numbers between the first and the last of the versions that none of them has."""
    numbers = {Version(version).release for version in versions}
    first, last = min(numbers), max(numbers)
    if first[:-1] != last[:-1]:
        return []
    between = ((*first[:-1], micro) for micro in range(first[-1], last[-1]))
    return [".".join(map(str, number)) for number in between if number not in numbers]


def release(version: str) -> Sources:
    """The sources of a release, its wheel downloaded unless the cache has it.

    Raises:
        RuntimeError: pip failed; with what it said.
    """
    folder = cache_dir()
    if not list(folder.glob(f"sglang-{version}-*.whl")):
        options = ("--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder))
        _pip("download", *options, f"sglang=={version}")
    return read_wheel(next(folder.glob(f"sglang-{version}-*.whl")), "sglang", version)


def installed() -> Sources:
    """The sources of the installed SGLang, which is not imported."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise RuntimeError("sglang is not installed; run 'make install'")
    return read_folder(Path(spec.origin).parent, importlib.metadata.version("sglang"))


def own() -> Sources:
    """The sources of mixedprec_plugin."""
    import mixedprec_plugin

    return read_folder(Path(mixedprec_plugin.__path__[0]), mixedprec_plugin.__version__)


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
