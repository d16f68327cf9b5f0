"""Compare what two versions of the package convert and serve, byte for byte.

    python -m benchmarks.before_and_after [--before TREE] [--after TREE] [CASE ...]
    python -m benchmarks.before_and_after --after TREE --save FILE [CASE ...]
    python -m benchmarks.before_and_after --against FILE [CASE ...]

TREE is a git revision or the folder of a checkout; each is installed into a folder of its own. CASE
is "MODEL PRESET [KEY=VALUE ...]": a shape of the demo's model or a folder, a packaged preset or a
file, and overrides. It is converted in both formats and served by SGLang, each in a process of its
own, on one thread.

Not compared, because they may differ: the release, and the paths and times of the sources' files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import served_facts
from demo.model import checkpoint

ROOT = Path(__file__).resolve().parents[1]
# AWQ and block FP8; FP8 with a scale a channel and block INT8; experts in GPTQ of 4 and 8 bits
CASES = (
    "widened attention-fp8-mlp-int4",
    "widened first-last-bf16-int4 schemes.ends.method=fp8_channel schemes.int8.method=int8 "
    "rules.0.scheme=int8",
    "experts moe-hot-experts lists.hot=[1]",
)
FORMATS = ("mixedprec", "compressed-tensors")
# files that are compared key by key, and the keys that are not
_RECORDS = ("config.json", "mixedprec_provenance.json")
_LEFT_OUT = r"quantization_config version|inputs the (release|sources' files)|sources .* path"
_NOT_INSTALLED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
Facts = dict[str, str]


class ComparisonError(Exception):
    """A tree cannot be installed or served, or a saved result does not compare."""


def main(arguments: list[str] | None = None) -> int:
    """Compare, or save one side; return 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_and_after")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--before", metavar="TREE", default="HEAD")
    parser.add_argument("--after", metavar="TREE", default=str(ROOT))
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what --after gives here")
    parser.add_argument("--against", type=Path, metavar="FILE", help="saved, instead of --before")
    options = parser.parse_args(arguments)
    cases = options.cases or CASES
    if options.save is not None:
        results = {"environment": environment(), "cases": run(options.after, cases)}
        options.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return 0
    if options.against is None:
        before = run(options.before, cases)
    else:
        saved = json.loads(options.against.read_text(encoding="utf-8"))
        if saved["environment"] != environment():
            text = f"was saved with {saved['environment']} (expected {environment()})"
            raise ComparisonError(f"{options.against}: {text}; save it again")
        before, cases = saved["cases"], options.cases or list(saved["cases"])
    after = run(options.after, cases)
    found = {case: differences(before[case], after[case]) for case in cases}
    for case, lines in found.items():
        print(f"{case}: {len(before[case])} compared", *lines, sep="\n    ")
    print(f"{len(found)} cases, {sum(map(bool, found.values()))} differ")
    return 1 if any(found.values()) else 0


def environment() -> Facts:
    """What else decides the bytes."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": capability, "sglang": version("sglang"), "torch": version("torch")}


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A line for each group of facts that differ; in a group, only the numbers in names do."""
    groups: dict[str, list[str]] = {}
    for name in sorted({*before, *after}):
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    lines = []
    for group, names in groups.items():
        different = [name for name in names if before.get(name) != after.get(name)]
        if different:
            was, now = (facts.get(different[0], "nothing") for facts in (before, after))
            text = f"{group}: {len(different)} of {len(names)} differ"
            lines.append(f"{text}; {different[0]} was {was}, is {now}")
    return lines


def run(tree: str, cases: Iterable[str]) -> dict[str, Facts]:
    """Install a tree and run cases with it: case -> name of a fact -> fact."""
    with tempfile.TemporaryDirectory(prefix="mixedprec-compare-") as folder:
        site = install(tree, Path(folder))
        results = {}
        for case in cases:
            print(f"{tree}: {case} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                results[case] = _run_case(case, site, Path(work))
        return results


def install(tree: str, folder: Path) -> Path:
    """Install a tree, which stays as it is; return the folder to import it from."""
    source, site = folder / "source", folder / "site"
    if Path(tree).is_dir():
        shutil.copytree(tree, source, ignore=_NOT_INSTALLED)
    else:
        archive = folder / "source.tar"
        _call(["git", "archive", "--output", str(archive), tree], ROOT)
        shutil.unpack_archive(archive, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(source)], folder)
    # a script imports what lies beside it, whatever else is installed
    shutil.copy(served_facts.__file__, site)
    return site


def _call(command: list[str], folder: Path, *fine: int, **variables: str) -> tuple[int, str]:
    """Run a command, whose exit code must be 0 or one of `fine`; return that and what it prints."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode not in (0, *fine):
        text = f"exit code {done.returncode}\n{done.stdout[-3000:]}"
        raise ComparisonError(f"{shlex.join(command)}: {text}")
    return done.returncode, done.stdout


def _run_case(case: str, site: Path, work: Path) -> Facts:
    model, preset, *overrides = shlex.split(case)
    model = str(Path(model).resolve() if Path(model).is_dir() else checkpoint(model))
    preset = str(Path(preset).resolve()) if Path(preset).is_file() else preset
    variables = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    facts: Facts = {}
    for name in FORMATS:
        command = [sys.executable, str(site / "bin" / "mixedprec"), "convert", "--device", "cpu"]
        command += ["--model", model, "--preset", preset, "--out", name, "--format", name]
        command += [word for override in overrides for word in ("--mixedprec-set", override)]
        code, printed = _call(command, work, 1, **variables)
        facts |= {f"{name}: exit code": str(code), f"{name}: printed": printed}
        facts |= {f"{name}: {key}": fact for key, fact in folder_facts(work / name).items()}
    command = [sys.executable, str(site / "served_facts.py"), "served.json"]
    _call([*command, model, preset, *overrides], work, **variables)
    served = json.loads((work / "served.json").read_text(encoding="utf-8"))
    return facts | {f"served: {key}": fact for key, fact in served.items()}


def folder_facts(folder: Path) -> Facts:
    """Digests of every file and tensor of a converted folder; of its records, key by key."""
    facts: Facts = {}
    for path in sorted(folder.glob("*")):
        if path.name in _RECORDS:
            record = json.loads(path.read_text(encoding="utf-8"))
            facts |= {f"{path.name} {key}": fact for key, fact in _record_facts(record)}
            continue
        facts[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    facts[f"{path.name} {name}"] = served_facts.digest(file.get_tensor(name))
    return facts


def _record_facts(value: Any, *keys: str) -> Iterator[tuple[str, str]]:
    name = " ".join(keys)
    if re.fullmatch(_LEFT_OUT, name):
        return
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _record_facts(below, *keys, key)
    else:
        text = json.dumps(value)
        yield name, text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
