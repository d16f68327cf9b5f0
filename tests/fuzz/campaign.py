"""Many inputs, each a change of a valid one or of one that led to words not seen before."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.case import Case, Outcome, run_case
from tests.fuzz.mutations import (
    change_bytes,
    change_head,
    change_json,
    change_tensors,
    change_yaml,
    changed_text,
    odd_value,
)
from tests.fuzz.seeds import ARGUMENTS, OVERRIDES, PARENT, presets, seeds

MAX_KEPT = 2000
# that one input may add to what was ever in use
MAX_BYTES = 512 << 20
_MEMORY = Path("/dev/shm")
# of a hundred inputs, those that really convert: each takes as long as many others
CONVERTED = 2


@dataclasses.dataclass
class Campaign:
    """What was found so far.

    Attributes:
        folder: where the inputs lie while they run; on a memory file system, best.
        findings: what is wrong -> the first input and its outcome.
        counts: exit code, or -1, -> number of inputs.
    """

    folder: Path
    rng: random.Random
    findings: dict[str, tuple[Case, Outcome]] = dataclasses.field(default_factory=dict)
    counts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    repeated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self.seeds = seeds(self.folder)
        self.presets = presets()
        # by exit code: what is right can be changed further than what is wrong already
        self.kept: dict[int, list[Case]] = {0: [], 1: [], 2: []}
        self._words: set[str] = set()
        self._peak = 0

    def run(self, seconds: float, num: int = 1 << 60) -> None:
        """Try inputs for some time, or some of them."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.counts.total() < num:
            # what is too deep or too large to be changed is left as it is
            case = self.chosen()
            with contextlib.suppress(RecursionError, OverflowError):
                case = self.changed(case)
            self.try_one(case)

    def try_one(self, case: Case) -> None:
        """Run one input and note what became of it."""
        outcome = run_case(case, self.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if self._peak and peak - self._peak > MAX_BYTES:
            outcome = Outcome(-1, f"{case.argv[0]} takes memory", f"{peak - self._peak} bytes")
        self._peak = peak
        self.counts[outcome.code] += 1
        if outcome.finding:
            self.repeated[outcome.finding] += 1
            if outcome.finding not in self.findings:
                self.findings[outcome.finding] = (case, outcome)
                print(f"{self.counts.total()} inputs: {outcome.finding}", file=sys.stderr)
        elif outcome.words - self._words:
            self._words |= outcome.words
            kept = self.kept[outcome.code]
            if len(kept) < MAX_KEPT:
                kept.append(case)
            else:
                kept[self.rng.randrange(MAX_KEPT)] = case

    def chosen(self) -> Case:
        """A valid input, or one that was kept."""
        case = self._chosen()
        argv = [word for word in case.argv if word != "--json"]
        # a table takes as long to print as all the rest
        if argv[0] != "convert" and self.rng.randrange(16):
            argv.append("--json")
        return Case(tuple(argv), case.files)

    def _chosen(self) -> Case:
        rng = self.rng
        if rng.randrange(2) and (kept := self.kept[rng.choice((0, 0, 1))]):
            return rng.choice(kept)
        files = dict(rng.choice(self.seeds))
        # presets take longest of all to read
        preset = rng.choice(self.presets if rng.randrange(4) == 0 else self.presets[:4])
        files |= {"preset.yaml": (preset,), "parent.yaml": (PARENT.encode(),)}
        return Case(self.argv(files), files)

    def argv(self, files: dict[str, tuple[bytes, ...]]) -> tuple[str, ...]:
        """A verb with its arguments."""
        rng = self.rng
        named = ("--model", "model", "--preset", "preset.yaml")
        is_converted = any("provenance" in name for name in files)
        if rng.randrange(100) < (CONVERTED if "out" not in "".join(files) else 50):
            if "out" in "".join(files) or rng.randrange(3):
                return ("convert", *named, "--device", "cpu", "--out", "out")
            return ("verify", *named, "--device", "cpu", "--reference", "model")
        if rng.randrange(3) == 0:
            return ("inspect", "model")
        named = named[:2] if is_converted and rng.randrange(2) else named
        more = rng.choice(ARGUMENTS) if rng.randrange(4) else (f"--set={override(rng)}",)
        return ("plan", *named, *more)

    def changed(self, case: Case) -> Case:
        """The input with one to three things changed."""
        rng, files = self.rng, dict(case.files)
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice(sorted(files))
            pieces = files[name]
            if name.endswith(".safetensors"):
                files[name] = changed_weights(rng, pieces[0], b"".join(pieces[1:]))
            elif name.endswith(".yaml"):
                files[name] = (change_yaml(rng, pieces[0]),)
            elif name.endswith(".json"):
                files[name] = (change_json(rng, pieces[0]),)
            elif name.endswith(".jsonl"):
                lines = pieces[0].split(b"\n")
                at = rng.randrange(len(lines))
                lines[at] = change_json(rng, lines[at])
                files[name] = (b"\n".join(lines),)
            if rng.randrange(100) == 0:
                files[changed_name(rng, name)] = files.pop(name)
        return Case(case.argv, files)


def reduced(case: Case, outcome: Outcome, folder: Path) -> Case:
    """The same finding with fewer files, and with nothing in weights that does not matter."""
    for name, pieces in case.files.items():
        files = dict(case.files)
        del files[name]
        zeros = (pieces[0], bytes(sum(map(len, pieces[1:]))))
        for fewer in (files, {**case.files, name: zeros}):
            smaller = Case(case.argv, fewer)
            if run_case(smaller, folder).finding == outcome.finding:
                case = smaller
                break
    return case


def override(rng: random.Random) -> str:
    """A text for `--set`."""
    key, value = rng.choice(OVERRIDES).split("=", 1)
    key = changed_text(rng, key) if rng.randrange(3) == 0 else key
    if rng.randrange(2):
        return f"{key}={json.dumps(odd_value(rng), ensure_ascii=False)}"
    return f"{key}={changed_text(rng, value)}"


def changed_weights(rng: random.Random, head: bytes, data: bytes) -> tuple[bytes, bytes]:
    """A safetensors file with a tensor, its header or, seldom, its data changed."""
    if rng.randrange(50) == 0:
        return head, change_bytes(rng, data)
    if rng.randrange(3):
        # it may be none any longer
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError):
            return change_tensors(rng, head, data)
    return change_head(rng, head), data


def changed_name(rng: random.Random, name: str) -> str:
    """Another name in the same folder."""
    folder, _, last = name.rpartition("/")
    other = rng.choice(
        ("x.safetensors", "config.json", f"{last}.tmp", "hf_quant_config.json", "quant_config.json")
    )
    return f"{folder}/{other}" if folder else other


def work(
    seconds: float, num: int, seed: int
) -> tuple[dict[int, int], dict[str, tuple[str, str, int]]]:
    """Run a campaign in this process: counts, and findings with input, details and number."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    where = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="mixedprec-fuzz-", dir=where) as folder:
        campaign = Campaign(Path(folder) / "input", random.Random(seed))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)
        campaign.run(seconds, num)
        found = {}
        for finding, (case, outcome) in campaign.findings.items():
            text = reduced(case, outcome, campaign.folder).as_text()
            found[finding] = text, outcome.details, campaign.repeated[finding]
    return dict(campaign.counts), found
