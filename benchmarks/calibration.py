"""Compare calibrated rounding with rounding to nearest, by what it costs in predictions.

    python -m benchmarks.calibration [--model NAME] [--parts N] [--out docs/calibration.md]

On the models of benchmarks/calibration_models.py, beside other tools (benchmarks/rounding_peers.py)
where they are installed. The texts are none that anything was chosen on: Python's own manual pages,
and the source of its library; and text that the model writes anew. A part is a checkpoint that is
made, or all checkpoints of a model on one text. Each is kept below --work as soon as it is there: a
run that was stopped goes on, and what lies there is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import itertools
import json
import pydoc_data.topics
import sys
import tarfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration_models import SUBJECTS, Subject
from benchmarks.calibration_page import CODE, MANUAL, NEAREST, OWN, Rows, figures_of, write_page
from benchmarks.figures import keep
from benchmarks.rounding_peers import PEERS, PeerError
from mixedprec_plugin.cli.main import main as mixedprec

MATCH = ["*_proj", "*.experts.*"]
GROUP, BLOCK = 64, [64, 64]
PRESETS: dict[str, dict[str, Any]] = {
    "awq, groups of 64": {"method": "awq", "group_size": GROUP},
    "gptq, groups of 64": {"method": "gptq", "group_size": GROUP},
    "nvfp4": {"method": "nvfp4"},
    "fp8_channel": {"method": "fp8_channel"},
    "blockwise_int8, 64 x 64": {"method": "blockwise_int8", "weight_block_size": BLOCK},
}
# how ours is rounded -> what `convert --calibrate` is told besides
OURS = {
    "calibrated": [],
    "calibrated, folded": ["--fold"],
    "calibrated, no gradients": ["--no-gradients"],
}
# the model's own text: of another seed than what was calibrated on
OWN_SIZE = ("--windows", 64, "--length", 128, "--seed", 1)
ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> str:
    """Run a verb; returns what it printed."""
    out = io.StringIO()
    code = mixedprec([str(word) for word in words], out=out)
    if code:
        raise SystemExit(out.getvalue() or code)
    return out.getvalue()


def texts(folder: Path) -> dict[str, Path]:
    """The two texts, as files."""
    code = "\n\n".join(map(inspect.getsource, (tarfile, argparse, textwrap)))
    manual = "\n\n".join(pydoc_data.topics.topics.values())
    found = {MANUAL: manual, CODE: code}
    for name, text in found.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in found}


class Bench:
    """What was measured, kept in a folder.

    Args:
        folder: made if it is not there.
        windows, length: of each text.
    """

    def __init__(self, folder: Path, windows: int, length: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size = folder, ("--windows", windows, "--length", length)
        self._kept = folder / "rows.json"
        self.rows: dict[str, Rows] = {}
        if self._kept.exists():
            self.rows = json.loads(self._kept.read_text(encoding="utf-8"))

    def parts(self, subject: Subject) -> Iterator[str]:
        """Measure what is missing of a model, a part at a time; yields each once it is kept."""
        folder = self._folder / subject.name
        folder.mkdir(exist_ok=True)
        rows = self.rows.setdefault(subject.title, {})
        model = subject.checkpoint(folder)
        for preset, rounding in subject.variants:
            name = f"{preset} | {rounding}"
            if name in rows:
                continue
            if made := self._make(subject, model, folder, preset, rounding):
                rows[name] = {"preset": preset, "rounding": rounding, **made}
                self._keep()
                yield f"{subject.title}: {name}"
        for text, path in {**texts(folder), OWN: None}.items():
            if missing := {x["path"]: x for x in rows.values() if "path" in x and text not in x}:
                self._evaluate(model, text, path, missing)
                self._keep()
                yield f"{subject.title}: {text}, {len(missing)} checkpoints"

    def _make(
        self, subject: Subject, model: Path, folder: Path, preset: str, rounding: str
    ) -> dict[str, Any] | None:
        """Make a checkpoint: where it is and what it took, or "why" there is none.

        Returns:
            None if its tool is not installed.
        """
        scheme = PRESETS[preset]
        path = folder / f"{scheme['method']}.yaml"
        write_preset(path, {"rules": [{"match": MATCH, **scheme}]})
        if rounding == NEAREST:
            return {"path": str(path)}
        if rounding in OURS:
            out = folder / f"{scheme['method']}-{rounding.replace(', ', '-').replace(' ', '-')}"
            return convert(model, path, out, [*OURS[rounding], *subject.options])
        peer = next(peer for peer in PEERS if peer.title == rounding)
        if not peer.is_installed():
            return None
        begun = time.monotonic()
        try:
            made = peer.make(model, folder)
        except PeerError as error:
            return {"why": str(error)}
        content: dict[str, Any] = {"sources": {"peer": {"path": str(made)}}}
        # what it folded into norms is taken with its layers
        content["rules"] = [
            {"match": "*", "method": "auto", "source": "peer"},
            {"match": MATCH, **scheme, "source": "peer"},
        ]
        path = folder / f"{peer.tool.name}.yaml"
        write_preset(path, content)
        return {"path": str(path), "minutes": (time.monotonic() - begun) / 60}

    def _evaluate(
        self, model: Path, text: str, path: Path | None, rows: dict[str, dict[str, Any]]
    ) -> None:
        named = itertools.chain.from_iterable(("--preset", name) for name in rows)
        size = OWN_SIZE if path is None else ("--text", path, *self._size)
        found = json.loads(
            run("eval", "--device", "cpu", "--model", model, *named, *size, "--json")
        )
        for one in found["rows"][1:]:
            rows[one["name"]] |= {"bits": one["bits"], text: one["found"]}

    def _keep(self) -> None:
        staging = self._kept.with_suffix(".tmp")
        staging.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        staging.replace(self._kept)


def convert(model: Path, preset: Path, out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Calibrate and write a checkpoint: where, its predicted loss, its CPU seconds.

    One that was stopped goes on, and its seconds are not known then.
    """
    is_new, begun = not out.exists(), time.process_time()
    words = ["--model", model, "--preset", preset, "--out", out, "--calibrate", *options]
    run("convert", "--device", "cpu", *words)
    made = json.loads((out / "mixedprec_calibration.json").read_text(encoding="utf-8"))
    return {
        "path": str(out),
        "seconds": time.process_time() - begun if is_new else None,
        "predicted": made["predicted_loss"] if made["gradients"] else None,
        "unseen": sum(not layer["tokens"] for layer in made["layers"]),
    }


def write_preset(path: Path, content: dict[str, Any]) -> None:
    """Write a preset: JSON is YAML."""
    path.write_text(json.dumps({"version": 1, **content}), encoding="utf-8")


def main() -> None:
    """Measure what is missing, and write the page of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--model", action="append", choices=names, help="repeatable; default: all")
    parser.add_argument("--parts", type=int, help="stop after so many; the next run goes on")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "calibration")
    parser.add_argument("--out", type=Path, help="the page, and its numbers beside it as .json")
    args = parser.parse_args()
    bench = Bench(args.work, args.windows, args.length)
    wanted = [subject for subject in SUBJECTS if subject.name in (args.model or names)]
    parts = itertools.chain.from_iterable(map(bench.parts, wanted))
    with contextlib.redirect_stderr(sys.__stderr__):
        for part in itertools.islice(parts, args.parts):
            print(part, file=sys.stderr, flush=True)
    if first := bench.rows.get(SUBJECTS[0].title):
        keep("rounding", figures_of(first))
    if not args.out:
        return
    args.out.write_text(write_page(bench.rows, args.windows, args.length), encoding="utf-8")
    numbers = json.dumps(bench.rows, indent=1).replace(str(args.work), "")
    args.out.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
