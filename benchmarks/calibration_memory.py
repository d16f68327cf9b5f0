"""How much memory a calibrated conversion takes, for models of three widths and two depths.

    python -m benchmarks.calibration_memory [--out docs/calibration_memory.svg]

Llamas with random weights, calibrated on 2,048 tokens of a given text; the peak of the process's
own memory beside what it holds before. It should follow the width, and not the depth.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
from pathlib import Path

from matplotlib.figure import Figure

from mixedprec_plugin.cli.main import main as mixedprec
from mixedprec_plugin.cpu.heap import trim_heap
from tests.calibrate.models import SIZES, VOCABULARY, write_model

WIDTHS, DEPTHS = (256, 512, 768), (2, 8)
MIB = 2**20


class Watch:
    """The most memory that the process has of its own while a context lasts: `most`, in bytes.

    Pages of files are not counted: the checkpoint's are mapped, and the system takes them back.
    """

    def __enter__(self) -> Watch:
        self._done, self.most = threading.Event(), 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    """Anonymous resident memory in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def peak(width: int, depth: int, folder: Path) -> dict[str, float]:
    """Calibrate one model; bytes at most, and of one of its decoder layers in float32."""
    sizes = {
        **SIZES, "hidden_size": width, "intermediate_size": 8 * width // 3 // 64 * 64,
        "num_hidden_layers": depth, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "head_dim": 64,
    }  # fmt: skip
    model = write_model(folder / "model", sizes=sizes)
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    del model
    rule = {"match": "*_proj", "method": "awq", "group_size": 64}
    preset, text = folder / "preset.yaml", folder / "text.txt"
    # JSON is YAML
    preset.write_text(json.dumps({"version": 1, "rules": [rule]}), encoding="utf-8")
    words = random.Random(0).choices(range(3, VOCABULARY), k=2200)
    text.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    trim_heap()
    before = anonymous()
    with Watch() as watch:
        code = mixedprec([
            "convert", "--device", "cpu", "--model", str(folder / "model"), "--preset", str(preset),
            "--calibrate", "--text", str(text), "--windows", "16", "--out", str(folder / "out"),
        ])  # fmt: skip
    if code:
        raise SystemExit(code)
    return {"width": width, "depth": depth, "layer": layer, "peak": watch.most - before}


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Draw peaks over the bytes of a decoder layer, a line for each depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for depth in DEPTHS:
        own = [row for row in rows if row["depth"] == depth]
        layers, peaks = ([row[key] / MIB for row in own] for key in ("layer", "peak"))
        axes.plot(layers, peaks, marker="o", label=f"{depth} decoder layers")
        axes.plot(layers, [depth * x for x in layers], ":", label=f"{depth} layers in float32")
    axes.set(xlabel="one decoder layer in float32, MiB", ylabel="peak, MiB", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, float]] = []
    # the first run imports and compiles
    for width, depth in [(64, 1), *((w, d) for w in WIDTHS for d in DEPTHS)]:
        with tempfile.TemporaryDirectory() as name:
            rows.append(peak(width, depth, Path(name)))
        found = rows[-1]
        print(f"{width} x {depth}: a layer {found['layer'] / MIB:.0f} MiB, "
              f"peak {found['peak'] / MIB:.0f} MiB", file=sys.stderr, flush=True)  # fmt: skip
    if args.out:
        draw(rows[1:], args.out)


if __name__ == "__main__":
    main()
