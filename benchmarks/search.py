"""Measure `mixedprec search`: what it finds, how long it takes, and what AutoScheme finds instead.

    python -m benchmarks.search [--windows 8] [--length 1024] [--bits 4.5 5 6] [--out FILE]

auto-round's AutoScheme chooses and rounds in an environment of its own, at the same bits, scales
counted, with fused modules, on English prose; ours on text that the model writes. Where it is not
installed, its rows say so. KL(bf16 || quantized) is measured by `mixedprec eval`, weights only, on
texts that nothing was chosen on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration import texts
from demo.model import cache_dir, checkpoint
from mixedprec_plugin.cli.main import main as mixedprec
from mixedprec_plugin.search.allocate import Table, allocate

HEAD = Path(__file__).with_name("data") / "search.md"
_WEIGHT_ONLY = "awq,gptq,int8_channel"


def run(*words: object) -> str:
    """Run a verb; returns what it printed."""
    out = io.StringIO()
    code = mixedprec([str(word) for word in words], out=out)
    if code:
        raise SystemExit(code)
    return out.getvalue()


def find(model: Path, bits: float, folder: Path, options: list[str]) -> dict[str, Any]:
    """Search and convert; returns what the search printed, and where the model is."""
    out = folder / f"ours-{bits:g}"
    command = ["search", "--device", "cpu", "--model", model, "--bits", bits, "--json"]
    command += ["--methods", _WEIGHT_ONLY, "--out", folder / f"{bits:g}.yaml", *options]
    searched: dict[str, Any] = json.loads(run(*command))
    again = time.monotonic()
    run(*command)
    searched["again"] = time.monotonic() - again
    preset = folder / f"{bits:g}.yaml"
    run("convert", "--device", "cpu", "--model", model, "--preset", preset, "--out", out)
    return searched | {"folder": out}


def auto_scheme(model: Path, bits: float, folder: Path, log: Path) -> Path | None:
    """AutoScheme's model with plain weights; None where it is not installed or fails."""
    python = cache_dir() / "envs" / "auto-round" / "bin" / "python"
    if not python.exists():
        return None
    out = folder / f"auto-{bits:g}"
    module = "benchmarks.third_party.auto_scheme"
    command = [str(python), "-m", module, str(model), str(bits), str(out)]
    with log.open("ab") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    return out if done.returncode == 0 else None


def measure(
    model: Path, ours: list[Path], theirs: list[Path], folder: Path, size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """Folder name -> text -> KL."""
    plain = folder / "plain.yaml"
    plain.write_text("version: 1\nrules: [{match: '*', method: unquantized}]\n")
    found: dict[str, dict[str, Any]] = {}
    for title, text in texts(folder).items():
        options = ("--text", text, "--windows", size[0], "--length", size[1], "--json")
        presets = [word for path in ours for word in ("--preset", path)]
        runs = [("--model", model, *presets)] if ours else []
        runs += [("--model", x, "--reference", model, "--preset", plain) for x in theirs]
        names = [[path.name for path in ours], *([path.name] for path in theirs)]
        for own, words in zip(names[not ours :], runs, strict=True):
            made = json.loads(run("eval", "--device", "cpu", *words, *options))
            for name, row in zip(own, made["rows"][1:], strict=True):
                found.setdefault(name, {})[title] = row["found"]["kl"]
        print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def allocation_of_a_trillion() -> str:
    """70,000 experts of 14 million weights, simulated scores, as one sentence."""
    generator = np.random.default_rng(0)
    count, bits = 70_000, np.array([4.25, 4.3125, 4.625, 8.02, 8.05, 16.0])
    scale = generator.lognormal(0, 2, (count, 1))
    loss = (
        scale
        * np.array([1.2, 1.0, 0.8, 0.02, 0.01, 0.0])
        * generator.lognormal(0, 0.3, (count, len(bits)))
    )
    size = np.tile(bits / 8 * 14_000_000, (count, 1)).round()
    table = Table(tuple(map(str, range(count))), tuple(map(str, bits)), loss, size)
    begun = time.monotonic()
    found = allocate(table, int(count * 14_000_000 * 5 / 8))
    seconds = time.monotonic() - begun
    return (
        f"{count:,} units of 14 million weights and {len(bits)} candidates, scores simulated: "
        f"{seconds:.1f} s, at most {found.gap:.5%} above the least that is possible."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of what was found at each number of bits."""
    lines = [
        "| bits | predicted | KL, manual | KL, code | AutoScheme, manual | code | ours of it |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours, theirs = row["ours"], row.get("theirs")
        cells = [f"{row['bits']:.2f}", f"{row['predicted']:.4f}"]
        cells += [f"{ours[x]['value']:.4f} ± {ours[x]['error'] or 0:.4f}" for x in ours]
        if theirs:
            cells += [f"{theirs[x]['value']:.4f}" for x in theirs]
            shares = [f"{ours[x]['value'] / theirs[x]['value']:.2f}" for x in ours]
            cells.append(" / ".join(shares))
        else:
            cells += ["not there", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.0, 6.0])
    parser.add_argument("--out", type=Path)
    args, options = parser.parse_known_args()
    model = checkpoint("original")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(sys.__stderr__):
        folder = Path(name)
        rows = []
        for bits in args.bits:
            made = find(model, bits, folder, options)
            other = auto_scheme(model, bits, folder, folder / "auto-scheme.log")
            measured = measure(
                model, [made["folder"]], [other] if other else [], folder,
                (args.windows, args.length),
            )  # fmt: skip
            rows.append({
                "bits": made["point"]["bits"], "predicted": made["point"]["loss"],
                "ours": measured[made["folder"].name], "seconds": made["seconds"],
                "again": made["again"], "made": made["scores_made"],
            } | ({"theirs": measured[other.name]} if other else {}))  # fmt: skip
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    first = rows[0]
    page = "\n".join([
        HEAD.read_text(encoding="utf-8").rstrip(), "",
        f"`make bench-search`; {packages}, {platform.machine()}; {args.windows} windows of "
        f"{args.length} tokens a text.", "", table(rows), "",
        f"The first search took {first['seconds']:.0f} s and made {first['made']:,} scores, the "
        f"second {first['again']:.1f} s and none.", "", allocation_of_a_trillion(), "",
    ])  # fmt: skip
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
