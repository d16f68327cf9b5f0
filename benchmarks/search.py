"""Measure `mixedprec search`: what it finds, how long it takes, and what AutoScheme finds instead.

    python -m benchmarks.search [--part PART]… [--work DIR] [--out docs/search.md]

auto-round's AutoScheme chooses and rounds in an environment of its own, at the same bits, scales
counted, with fused modules, on English prose; ours on text that the model writes. Where it is not
installed, its cells say so. KL(bf16 || quantized) is measured by `mixedprec eval`, weights only, on
texts that nothing was chosen on. Parts keep what they made in the work folder, and their numbers in
a file there: what was stopped goes on, and the page is written of what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import search_experts, search_scale
from benchmarks.calibration import run, texts
from benchmarks.search_convert import convert_all
from demo.model import cache_dir, checkpoint
from mixedprec_plugin.calibrate.calibrator import Options
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.search.candidates import find_choices
from mixedprec_plugin.search.finder import loss_of
from mixedprec_plugin.search.kept import Basis, KeptScores

HEAD = Path(__file__).with_name("data") / "search.md"
BITS = (4.5, 5.0, 6.0)
_METHODS = "awq,gptq,int8_channel"
# how presets are found -> what is said of it, and the options that do it
WAYS: dict[str, tuple[str, list[str]]] = {
    "ours": ("search, calibrated", []),
    "load": ("search --at-load", ["--at-load"]),
    "fast": ("search --fast --at-load", ["--fast", "--at-load"]),
}
PEER = ("auto", "AutoScheme, to the nearest")

Results = dict[str, Any]


class Bench:
    """The parts; each returns its numbers.

    Args:
        work: where presets and models are kept.
        size: windows, and tokens of each, to measure on.
        windows: pieces of its own text that a model is calibrated on.
    """

    def __init__(self, work: Path, size: tuple[int, int], windows: int) -> None:
        self._work, self._size, self._windows = work, size, windows
        self._model = checkpoint("original")

    def found(self) -> Results:
        """Every preset, and how long another budget took."""
        made: Results = {}
        for way, (_, options) in WAYS.items():
            for bits in BITS:
                begun = time.monotonic(), time.process_time()
                out = self._work / f"{way}-{bits:g}.yaml"
                one = json.loads(run(
                    "search", "--device", "cpu", "--model", self._model, "--bits", bits, "--json",
                    "--methods", _METHODS, "--out", out, *options,
                ))  # fmt: skip
                made[f"{way}-{bits:g}"] = {
                    "bits": one["point"]["bits"], "predicted": self._predicted(one),
                    "gap": one["gap"], "made": one["scores_made"],
                    "seconds": time.monotonic() - begun[0], "cpu": time.process_time() - begun[1],
                }  # fmt: skip
        return made

    def converted(self) -> Results:
        """The model in the presets that ask for calibration."""
        presets = {f"{bits:g}": self._work / f"ours-{bits:g}.yaml" for bits in BITS}
        begun = time.process_time()
        options = Options(windows=self._windows)
        convert_all(self._model, presets, self._work, options, _say)
        return {"windows": self._windows, "cpu": time.process_time() - begun}

    def peer(self) -> Results:
        """AutoScheme's models; the seconds of each, none where it is not installed or fails."""
        python = cache_dir() / "envs" / "auto-round" / "bin" / "python"
        made: Results = {}
        for bits in BITS if python.exists() else ():
            out, log = self._work / f"auto-{bits:g}", self._work / f"auto-{bits:g}.log"
            begun = time.monotonic()
            if not out.exists():
                module = "benchmarks.third_party.auto_scheme"
                command = [str(python), "-m", module, str(self._model), str(bits), str(out)]
                with log.open("wb") as output:
                    subprocess.run(
                        command, stdout=output, stderr=subprocess.STDOUT, check=False,
                        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
                    )  # fmt: skip
            if out.exists():
                made[f"{bits:g}"] = time.monotonic() - begun
        return made

    def measured(self) -> Results:
        """KL of all that is there: name -> text -> KL."""
        presets: dict[str, Path] = {}
        for bits in BITS:
            presets[f"ours-{bits:g}"] = self._work / f"model-{bits:g}"
            presets |= {f"{way}-{bits:g}": self._work / f"{way}-{bits:g}.yaml" for way in WAYS
                        if way != "ours"}  # fmt: skip
            if (peer := self._work / f"auto-{bits:g}").exists():
                presets[f"auto-{bits:g}"] = self._beside(peer)
        kept = self._work / "measured.json"
        found: Results = json.loads(kept.read_text()) if kept.exists() else {}
        for title, text in texts(self._work).items():
            for bits in BITS:
                own = {
                    name: path
                    for name, path in presets.items()
                    if name.endswith(f"-{bits:g}") and path.exists()
                    and title not in found.get(name, {})
                }  # fmt: skip
                if not own:
                    continue
                options = ("--text", text, "--windows", self._size[0], "--length", self._size[1])
                named = [word for path in own.values() for word in ("--preset", path)]
                command = ("eval", "--device", "cpu", "--model", self._model, *named)
                rows = json.loads(run(*command, *options, "--json"))["rows"][1:]
                for name, row in zip(own, rows, strict=True):
                    found.setdefault(name, {})[title] = row["found"]["kl"]
                kept.write_text(json.dumps(found))
                _say(json.dumps(found))
        return found

    def experts(self) -> Results:
        """Single experts against whole layers."""
        folder = self._work / "experts"
        folder.mkdir(exist_ok=True)
        return search_experts.part(folder)

    def _predicted(self, found: dict[str, Any]) -> float:
        """By the scores, whatever it was chosen by."""
        choices = find_choices(open_source(self._model), Target("cpu"), _METHODS.split(","))
        scores = KeptScores(choices, Basis()).read()
        return sum(loss_of(scores, unit, x["scheme"]) for unit, x in found["units"].items())

    def _beside(self, peer: Path) -> Path:
        """A preset of all of another model's layers."""
        path = self._work / f"{peer.name}.yaml"
        rules = [{"match": "*", "method": "auto", "source": "peer"}]
        content = {"version": 1, "sources": {"peer": {"path": str(peer)}}, "rules": rules}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(results: Results) -> str:
    """Markdown of what was found at each number of bits."""
    measured, found = results.get("measured", {}), results["found"]
    lines = ["| found by | bits | predicted | KL, manual | KL, code | of AutoScheme's |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    titles = {way: title for way, (title, _) in WAYS.items()} | dict([PEER])
    for bits in BITS:
        theirs = measured.get(f"auto-{bits:g}")
        for way, title in titles.items():
            name = f"{way}-{bits:g}"
            own, facts = measured.get(name, {}), found.get(name, {"bits": bits, "predicted": None})
            told = facts["predicted"]
            cells = [title, f"{facts['bits']:.2f}", "" if told is None else f"{told:.4f}"]
            for text in ("manual", "code"):
                kl = own.get(text)
                cells.append(f"{kl['value']:.4f} ± {kl['error']:.4f}" if kl else "not measured")
            if theirs and own and way != "auto":
                shares = (f"{own[x]['value'] / theirs[x]['value']:.2f}" for x in own if x in theirs)
                cells.append(" / ".join(shares))
            else:
                cells.append("")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: Results, size: tuple[int, int]) -> str:
    """The whole page, of the parts that are there."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [HEAD.read_text(encoding="utf-8").rstrip(), ""]
    if "found" in results:
        lines += [
            f"`make bench-search`; {packages}, {platform.machine()}; {size[0]} windows of "
            f"{size[1]} tokens a text; KL in nats a token, ± its standard error.", "",
            table(results), "",
        ]  # fmt: skip
        seconds = max(one["seconds"] for one in results["found"].values() if not one["made"])
        lines += [f"With scores that were there another budget took at most {seconds:.1f} s.", ""]
    if "experts" in results:
        said = search_experts.sentence(results["experts"])
        lines += ["### Experts that differ", "", said, ""]
    if "trillion" in results:
        lines += ["### A trillion parameters", "", search_scale.sentence(results["trillion"]), ""]
    if "sizes" in results:
        lines += ["### What scores cost", "", search_scale.table(results["sizes"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="all of them by default")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench-search")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--calibration-windows", type=int, default=Options().windows, help="of 128 tokens"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    size = args.windows, args.length
    bench = Bench(args.work, size, args.calibration_windows)
    kept = args.work / "results.json"
    results: Results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    with contextlib.redirect_stderr(sys.__stderr__):
        for part in args.part or PARTS:
            results[part] = PARTS[part](bench)
            kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = page(results, size)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


PARTS: dict[str, Callable[[Bench], Results]] = {
    "found": Bench.found,
    "converted": Bench.converted,
    "peer": Bench.peer,
    "measured": Bench.measured,
    "experts": Bench.experts,
    "trillion": lambda _: search_scale.trillion(),
    "sizes": lambda _: search_scale.sizes(),
}


if __name__ == "__main__":
    main()
