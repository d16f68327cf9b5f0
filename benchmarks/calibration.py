"""Compare calibrated rounding with rounding to nearest, by what it costs in predictions.

    python -m benchmarks.calibration [--windows 8] [--length 1024] [--out docs/calibration.md]

On the demo's model, whose weights lie on a grid of 16 levels for every 32, and on a twin of it with
noise of one step of that grid added, so that its weights are continuous. The texts are none that
anything was chosen on: Python's own manual pages, and the source of its library.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from demo.model import checkpoint
from mixedprec_plugin.cli.main import main as mixedprec

GROUP = 64
PRESETS = {
    "awq, groups of 64": {"method": "awq", "group_size": GROUP},
    "gptq, groups of 64": {"method": "gptq", "group_size": GROUP},
}
ROUNDINGS: dict[str, list[str]] = {
    "calibrated, no gradients": ["--no-gradients"],
    "calibrated": [],
}
HEAD = """\
# Calibrated rounding

`mixedprec convert --calibrate` rounds the layers that a preset quantizes to integers in groups
(`awq` and `gptq`, 4 and 8 bits) so that the model's predictions change least. It needs no data:
the model writes the text itself, from the beginning of a text and from the end of another one,
and draws the labels from its own predictions. `--text FILE` takes a text of yours instead.

    mixedprec convert --model MODEL --preset awq --calibrate --out DIR
    mixedprec eval --model MODEL --preset awq --preset DIR --text FILE

For each linear layer, tokens are weighed by the gradient that its outputs have (Fisher's
information), and the second moment of its inputs, so weighed, tells what an error in its weight
costs. Correlations that the text is too short to tell are shrunk (Ledoit and Wolf). Columns are
then rounded in turn, each error fed back to those that follow, and codes, scales and zero points
descend to where the loss is least. What is stored is an ordinary AWQ or GPTQ layer. Experts that
saw few tokens borrow from the others of their layer.

One decoder layer is in memory at a time; hidden states are on disk, a float32 number a token and
hidden feature for each decoder layer (1 GB for the demo's model, 37 GB for 70B). Only the text is
written with the whole model in memory: for one that does not fit, give `--text`. A conversion
that was stopped goes on where it was. `mixedprec_calibration.json` in the output says what was
calibrated on, and each layer's predicted loss.

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
    model: Path, folder: Path, windows: int, length: int, schemes: list[str]
) -> list[dict[str, Any]]:
    """Every scheme in every rounding, on every text."""
    rows: dict[str, dict[str, Any]] = {}
    for title in schemes:
        scheme = PRESETS[title]
        preset = folder / f"{scheme['method']}.yaml"
        # JSON is YAML
        rule = {"match": "*_proj", **scheme}
        preset.write_text(json.dumps({"version": 1, "rules": [rule]}), encoding="utf-8")
        rows[str(preset)] = {"preset": title, "rounding": "nearest"}
        for rounding, options in ROUNDINGS.items():
            out = folder / f"{model.name}-{scheme['method']}-{len(options)}"
            begun = time.process_time()
            run(
                "convert", "--device", "cpu", "--model", model, "--preset", preset, "--out", out,
                "--calibrate", *options,
            )  # fmt: skip
            seconds = time.process_time() - begun
            record = json.loads((out / "mixedprec_calibration.json").read_text())
            predicted = None if options else record["predicted_loss"]
            rows[str(out)] = {
                "preset": title, "rounding": rounding, "seconds": seconds, "predicted": predicted,
            }  # fmt: skip
    named = [word for name in rows for word in ("--preset", name)]
    for name, text in {**texts(folder), "own text": None}.items():
        size: tuple[object, ...] = ("--text", text, "--windows", windows, "--length", length)
        if text is None:
            # of another seed than the text that was calibrated on
            size = ("--windows", 64, "--length", 128, "--seed", 1)
        made = json.loads(run("eval", "--device", "cpu", "--model", model, *named, *size, "--json"))
        for found in made["rows"][1:]:
            rows[found["name"]] |= {"bits": found["bits"], name: found["found"]["kl"]}
        print(json.dumps([*rows.values()]), file=sys.stderr, flush=True)
    return [*rows.values()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of one model's rows."""
    names = ("manual", "code", "own text")
    lines = [
        "| preset | rounding | bits | " + " | ".join(f"KL, {name}" for name in names)
        + " | of nearest | predicted | CPU s |",
        "|---|---|---|" + "---|" * (len(names) + 3),
    ]  # fmt: skip
    for row in rows:
        plain = next(x for x in rows if (x["preset"], x["rounding"]) == (row["preset"], "nearest"))
        cells = [f"{row[name]['value']:.4f} ± {row[name]['error']:.4f}" for name in names]
        shares = " / ".join(f"{row[x]['value'] / plain[x]['value']:.2f}" for x in names)
        predicted = f"{row['predicted']:.4f}" if row.get("predicted") else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        first = f"| {row['preset']} | {row['rounding']} | {row['bits']:.2f} | "
        lines.append(first + " | ".join([*cells, shares, predicted, seconds]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(sys.__stderr__):
        folder = Path(name)
        model = checkpoint("original")
        models = {
            "SmolLM2-135M-Instruct": (model, [*PRESETS]),
            "Its twin with continuous weights": (twin(model, folder / "twin"), [*PRESETS][:1]),
        }
        found = {
            title: measure(path, folder, args.windows, args.length, schemes)
            for title, (path, schemes) in models.items()
        }
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    parts = [
        HEAD,
        "## Measured\n",
        MEASURED.format(
            python=platform.python_version(),
            packages=packages,
            machine=platform.machine(),
            windows=args.windows,
            length=args.length,
        ),
    ]
    for title, rows in found.items():
        parts += [f"### {title}\n", table(rows), ""]
    page = "\n".join(parts)
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
