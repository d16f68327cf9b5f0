"""Compare calibrated rounding with rounding to nearest, by what it costs in predictions.

    python -m benchmarks.calibration [--windows 8] [--length 1024] [--out docs/calibration.md]

On the demo's model, whose weights lie on a grid of 16 levels for every 32; on a twin of it with
noise of one step of that grid added, so that its weights are continuous; and on mixtures of
experts. Beside it other tools (benchmarks/rounding_peers.py), where they are installed. The texts
are none that anything was chosen on: Python's own manual pages, and the source of its library.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import platform
import pydoc_data.topics
import shutil
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rounding_peers import PEERS
from demo.model import checkpoint
from mixedprec_plugin.cli.main import main as mixedprec

Row = dict[str, Any]

GROUP = 64
MATCH = ["*_proj", "*.experts.*"]
BLOCK = [64, 64]
PLAIN, NO_GRADIENTS, CALIBRATED = "nearest", "calibrated, no gradients", "calibrated"
OPTIONS = {NO_GRADIENTS: ["--no-gradients"], CALIBRATED: []}
# preset -> scheme, and how it is rounded
PRESETS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "awq, groups of 64": ({"method": "awq", "group_size": GROUP}, [NO_GRADIENTS, CALIBRATED]),
    "gptq, groups of 64": ({"method": "gptq", "group_size": GROUP}, [CALIBRATED]),
    "fp8_channel": ({"method": "fp8_channel"}, [CALIBRATED]),
    "blockwise_int8, 64 x 64": (
        {"method": "blockwise_int8", "weight_block_size": BLOCK}, [CALIBRATED],
    ),
}  # fmt: skip
HEAD = """\
# Calibrated rounding

`mixedprec convert --calibrate` rounds the layers that a preset quantizes (`awq` and `gptq` in 4 and
8 bits, FP8 and INT8) so that the model's predictions change least. It needs no data:
the model writes the text itself, from the beginning of a text and from the end of another one,
and draws the labels from its own predictions. `--text FILE` takes a text of yours instead.

    mixedprec convert --model MODEL --preset awq --calibrate --out DIR
    mixedprec eval --model MODEL --preset awq --preset DIR --text FILE

For each linear layer, tokens are weighed by the gradient that its outputs have (Fisher's
information), and the second moment of its inputs, so weighed, tells what an error in its weight
costs. Correlations that the text is too short to tell are shrunk (Ledoit and Wolf). Columns are
then rounded in turn, each error fed back to those that follow, and codes, scales and zero points
descend to where the loss is least. What is stored is an ordinary layer of the method. Experts that
saw few tokens borrow from the others of their layer.

One decoder layer is in memory at a time; hidden states are on disk, a float32 number a token and
hidden feature for each decoder layer (1 GB for the demo's model, 37 GB for 70B), and the space is
asked for before the work. Only the text is
written with the whole model in memory: for one that does not fit, give `--text`. A conversion
that was stopped goes on where it was. `mixedprec_calibration.json` in the output says what was
calibrated on, and each layer's predicted loss. Memory follows the width of the model and not its
depth ([calibration_memory.svg](calibration_memory.svg), `python -m benchmarks.calibration_memory`).

`--no-gradients` counts all tokens alike: it needs one pass forward, for models that cannot be
differentiated. Several GPUs, or processes, share windows and layers:

    torchrun --nproc-per-node 4 -m mixedprec_plugin convert --calibrate --model MODEL ...
"""


MEASURED = """\
`make bench-rounding`; Python {python}, {packages}, {machine}. KL(bf16 || quantized) in nats a
token, ± its standard error over windows ({windows} of {length} tokens; of the model's own text,
which has another seed than the one that was calibrated on, 64 of 128), weights only. "Of nearest":
the share of what rounding to nearest costs, on each text. "Predicted": by the quadratic form, on
the text that was calibrated on. CPU seconds are of the whole conversion, the text included.
"""


def twin(model: Path, out: Path) -> Path:
    """Copy a model, with noise of one step of its grid added to each matrix of its blocks."""
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            groups = tensor.float().view(len(tensor), -1, 32)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            noise = torch.rand(groups.shape, generator=generator) - 0.5
            tensors[name] = (groups + noise * step).view(tensor.shape).bfloat16()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def run(*words: object) -> str:
    """Run a verb; returns what it printed."""
    out = io.StringIO()
    code = mixedprec([str(word) for word in words], out=out)
    if code:
        raise SystemExit(code)
    return out.getvalue()


def texts(folder: Path) -> dict[str, Path]:
    """The two texts, as files."""
    code = "\n\n".join(map(inspect.getsource, (tarfile, argparse, textwrap)))
    manual = "\n\n".join(pydoc_data.topics.topics.values())
    found = {"manual": manual, "code": code}
    for name, text in found.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in found}


def measure(
    model: Path, folder: Path, windows: int, length: int, schemes: Sequence[str], peers: bool
) -> list[Row]:
    """Every scheme in every rounding, and peers' on request, on every text."""
    folder.mkdir()
    rows: dict[str, Row] = {}
    for title in schemes:
        scheme, roundings = PRESETS[title]
        preset = folder / f"{scheme['method']}.yaml"
        write_preset(preset, {"rules": [{"match": MATCH, **scheme}]})
        rows[str(preset)] = {"preset": title, "rounding": PLAIN}
        for rounding in roundings:
            out = folder / f"{scheme['method']}-{len(OPTIONS[rounding])}"
            begun = time.process_time()
            run(
                "convert", "--device", "cpu", "--model", model, "--preset", preset, "--out", out,
                "--calibrate", *OPTIONS[rounding],
            )  # fmt: skip
            seconds = time.process_time() - begun
            record = json.loads((out / "mixedprec_calibration.json").read_text())
            predicted = None if rounding == NO_GRADIENTS else record["predicted_loss"]
            rows[str(out)] = {
                "preset": title, "rounding": rounding, "seconds": seconds, "predicted": predicted,
            }  # fmt: skip
    absent = []
    for peer in PEERS if peers else ():
        made = peer.make(model, folder)
        if made is None:
            absent.append({"preset": peer.preset, "rounding": f"{peer.title}: absent"})
            continue
        preset = folder / f"{peer.tool.name}.yaml"
        everything = {"match": "*", "method": "auto", "source": "peer"}
        own = {"match": MATCH, **PRESETS[peer.preset][0], "source": "peer"}
        content = {"sources": {"peer": {"path": str(made)}}, "rules": [everything, own]}
        write_preset(preset, content)
        rows[str(preset)] = {"preset": peer.preset, "rounding": peer.title}
    named = [word for name in rows for word in ("--preset", name)]
    for name, text in {**texts(folder), OWN: None}.items():
        size: tuple[object, ...] = ("--text", text, "--windows", windows, "--length", length)
        if text is None:
            # of another seed than the text that was calibrated on
            size = ("--windows", 64, "--length", 128, "--seed", 1)
        made_rows = json.loads(
            run("eval", "--device", "cpu", "--model", model, *named, *size, "--json")
        )
        for found in made_rows["rows"][1:]:
            rows[found["name"]] |= {"bits": found["bits"], name: found["found"]["kl"]}
    return [*rows.values(), *absent]


def write_preset(path: Path, content: dict[str, Any]) -> None:
    """Write a preset: JSON is YAML."""
    path.write_text(json.dumps({"version": 1, **content}), encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Markdown of one model's rows."""
    names = ("manual", "code", OWN)
    lines = [
        "| preset | rounding | bits | " + " | ".join(f"KL, {name}" for name in names)
        + " | of nearest | predicted | CPU s |",
        "|---|---|--:|" + "--:|" * (len(names) + 3),
    ]  # fmt: skip
    for row in rows:
        if "bits" not in row:
            lines.append(f"| {row['preset']} | {row['rounding']} |" + " |" * (len(names) + 4))
            continue
        plain = next(x for x in rows if (x["preset"], x["rounding"]) == (row["preset"], PLAIN))
        cells = [f"{row[name]['value']:.4f} ± {row[name]['error']:.4f}" for name in names]
        shares = " / ".join(f"{row[x]['value'] / plain[x]['value']:.2f}" for x in names)
        predicted = f"{row['predicted']:.4f}" if row.get("predicted") else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        first = f"| {row['preset']} | {row['rounding']} | {row['bits']:.2f} | "
        lines.append(first + " | ".join([*cells, shares, predicted, seconds]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the models that are named, all by default, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="repeatable")
    parser.add_argument("--out", type=Path, help="the page, and its numbers beside it as .json")
    args = parser.parse_args()
    kept = args.out.with_suffix(".json") if args.out else None
    found: dict[str, list[Row]] = {}
    if kept and kept.exists() and args.model:
        found = json.loads(kept.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(sys.__stderr__):
        for title in args.model or MODELS:
            build, presets = MODELS[title]
            model = build(Path(name) / f"model-{len(found)}")
            work = Path(name) / f"work-{len(found)}"
            presets = [x for x in presets if x in (args.preset or presets)]
            has_peers = title == REAL and not args.preset
            found[title] = measure(model, work, args.windows, args.length, presets, has_peers)
            print(table(found[title]), file=sys.stderr, flush=True)
            if kept:
                kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = write_page(found, args.windows, args.length)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    else:
        print(page)


def write_page(found: dict[str, list[Row]], windows: int, length: int) -> str:
    """The whole page, from what was measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    measured = MEASURED.format(
        python=platform.python_version(), packages=packages, machine=platform.machine(),
        windows=windows, length=length,
    )  # fmt: skip
    parts = [HEAD, "## Measured\n", measured]
    for title, rows in found.items():
        parts += [f"### {title}\n", table(rows), ""]
    return "\n".join(parts)


REAL, OWN = "SmolLM2-135M-Instruct", "own text"
# title -> what makes it in a folder, and the presets
MODELS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    REAL: (lambda _: checkpoint("original"), [*PRESETS]),
    "Its twin with continuous weights": (
        lambda out: twin(checkpoint("original"), out), [*PRESETS][:1],
    ),
    "A mixture of four experts": (lambda _: checkpoint("experts"), [*PRESETS][:1]),
}  # fmt: skip


if __name__ == "__main__":
    main()
