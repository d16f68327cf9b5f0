"""Pack what a machine with Python 3.12 and torch, and without network, needs to run tests/gpu.

    python -m tests.gpu.kit [--out build/gpu-kit] [--no-wheels]        (make gpu-kit)

Writes pieces below 60 MB, and `run.sh`, which puts them together, installs them beside the
machine's torch, and runs `tests.gpu.in_order`. In them are the committed files of this repository,
the demo model's GGUF file, and a wheel for CPython 3.12 of each package that the SGLang installed
here asks for, in the version installed here, but for torch and what comes with it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

PIECE_BYTES = 59_000_000
_ROOT = Path(__file__).resolve().parents[2]
_FIRST = (("sglang", ()), ("mixedprec-plugin", ("test", "demo")), ("setuptools", ()), ("pip", ()))
# the machine's own
_TORCHS = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-(?!ml-py|cutlass).*|cuda-toolkit")
_MACHINE = {
    "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux",
    "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
    "implementation_name": "cpython", "platform_python_implementation": "CPython",
}  # fmt: skip
_PLATFORMS = (
    "manylinux1",
    "manylinux2010",
    "manylinux2014",
    *(f"manylinux_2_{n}" for n in range(5, 40)),
)
_RUN = """#!/bin/sh
# Unpacks the kit beside this script, installs it beside the torch of python3, and runs the GPU
# tests in order of worth. Usage: sh run.sh [OUT] [arguments of tests.gpu.in_order]
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
out="${1:-$here/results}"
test $# -eq 0 || shift
mkdir -p "$out"
(cd "$here" && sha256sum -c --quiet SHA256SUMS)
cat "$here"/kit.tar.* | tar -x -C "$here"
python3 -m venv --system-site-packages "$here/venv"
python="$here/venv/bin/python"
install() { "$python" -m pip install -q --no-index --no-deps "$@"; }
install --no-compile "$here"/kit/wheels/*.whl
install --no-build-isolation -e "$here/kit/repository"
export MIXEDPREC_CACHE="$here/kit/cache"
cd "$here/kit/repository"
exec "$python" -m tests.gpu.in_order --out "$out" "$@"
"""


def main(arguments: list[str] | None = None) -> int:
    """Build the kit and tell its size; 1 if wheels could not be had."""
    parser = argparse.ArgumentParser(description="Pack what tests/gpu needs on a bare machine.")
    parser.add_argument("--out", type=Path, default=_ROOT / "build" / "gpu-kit")
    parser.add_argument("--no-wheels", action="store_true", help="the repository and model alone")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    kit = options.out / "kit"
    (kit / "repository").mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=_ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", kit / "repository"], input=archive.stdout, check=True)
    _copy_model(kit / "cache")
    lacking = [] if options.no_wheels else _download(requirements(), kit / "wheels")
    pieces = pack(kit, options.out)
    shutil.rmtree(kit)
    total = sum(piece.stat().st_size for piece in pieces)
    print(f"{len(pieces)} pieces, {total / 1e6:,.0f} MB, {time.monotonic() - start:.0f} s")
    for name in lacking:
        print(f"no wheel of {name} for CPython 3.12", file=sys.stderr)
    return int(bool(lacking))


def requirements() -> list[str]:
    """`name==version` of each package that is needed, as it is installed here."""
    found: dict[str, str] = {}
    left = list(_FIRST)
    while left:
        name, extras = left.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found or _TORCHS.fullmatch(name):
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for text in distribution.requires or ():
            asked = Requirement(text)
            environments = [{**_MACHINE, "extra": extra} for extra in ("", *extras)]
            if asked.marker is None or any(map(asked.marker.evaluate, environments)):
                left.append((asked.name, tuple(asked.extras)))
    del found["mixedprec-plugin"]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _download(wanted: list[str], folder: Path) -> list[str]:
    """Fetch wheels, and return those that there are none of."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder)]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command += [f"--platform={name}_x86_64" for name in _PLATFORMS] + ["--platform=any"]
    if not subprocess.run([*command, *wanted], check=False).returncode:
        return []
    return [name for name in wanted if subprocess.run([*command, name], check=False).returncode]


def _copy_model(folder: Path) -> None:
    from demo.gguf_model import fetch_gguf
    from demo.model import cache_dir

    folder.mkdir()
    shutil.copy(fetch_gguf(cache_dir()), folder)


def pack(kit: Path, out: Path) -> list[Path]:
    """Write a folder as pieces of a tar file, with their digests and what unpacks them."""
    whole = out / "kit.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(kit, "kit")
    pieces = []
    for number, data in enumerate(_read(whole)):
        pieces.append(out / f"kit.tar.{number:03}")
        pieces[-1].write_bytes(data)
    whole.unlink()
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in pieces]
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    (out / "run.sh").write_text(_RUN, encoding="utf-8")
    return pieces


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            yield data


if __name__ == "__main__":
    raise SystemExit(main())
