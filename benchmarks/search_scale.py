"""What a search costs: an allocation at a trillion parameters, and scores at several sizes."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from benchmarks.calibration import run, texts
from benchmarks.calibration_page import MANUAL
from demo.model import checkpoint
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.search.candidates import find_choices
from mixedprec_plugin.search.finder import GUESSES, Budget, Search
from mixedprec_plugin.search.kept import Scores
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish
from tests import published

# decoder layers and windows of 128 tokens
_SIZES = ((1, 64), (2, 64), (4, 64), (2, 32), (2, 16))


def trillion() -> dict[str, Any]:
    """Kimi-K2's headers, every expert a unit, what units lose simulated: seconds of each step."""
    steps: dict[str, float] = {}
    begun = time.process_time()

    def step(name: str) -> None:
        nonlocal begun
        now = time.process_time()
        steps[name], begun = now - begun, now

    with tempfile.TemporaryDirectory() as name:
        folder = published.kimi_k2().write(Path(name) / "model")
        begun = time.process_time()
        choices = find_choices(open_source(folder), Target())
        step("candidates")
        scores = _simulated(guessed(choices))
        step("scores")
        found = Search(choices).run(Budget(bits=5.0), scores, GUESSES)
        step("allocation")
        text = preset_text(found.choices, Chosen(found.choice, found.losses, []))
        plan = publish(text, found.choices, found.choice, Path(name) / "found.yaml")
        step("preset")
    return {
        "units": len(choices.units), "weights": choices.num_weights,
        "candidates": len(choices.candidates), "gap": found.allocation.gap,
        "bits": found.point.bits, "rules": len(plan.preset.rules), "steps": steps,
        "schemes": len(set(found.choice.values())),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def _simulated(scores: Scores) -> Scores:
    """The rule of thumb's, units and candidates as unlike as real ones are."""
    generator = np.random.default_rng(0)

    def spread(own: dict[str, float]) -> Iterator[tuple[str, float]]:
        touchy = generator.lognormal(0, 2)
        for name, score in own.items():
            yield name, float(score * touchy * generator.lognormal(0, 0.3))

    return {unit: dict(spread(own)) for unit, own in scores.items()}


def sentence(made: dict[str, Any]) -> str:
    """What it took, as Markdown."""
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in made["steps"].items())
    return (
        f"Kimi-K2's shapes, {made['weights'] / 1e12:.2f} trillion weights in {made['units']:,} "
        f"units, each expert one, with up to {made['candidates']} candidates; what they lose is "
        f"simulated. {made['bits']:.2f} bits: at most {made['gap']:.3%} above the least that is "
        f"possible, in {made['schemes']} schemes and {made['rules']} rules. Processor time: "
        f"{steps}. Peak memory {made['peak'] / 1e9:.2f} GB."
    )


def sizes() -> dict[str, Any]:
    """Processor time of scores, of models with few of the real one's layers, on long texts."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        text = texts(Path(name))[MANUAL]
        for layers, windows in _SIZES:
            model = Path(name) / f"{layers}-{windows}"
            _shortened(checkpoint("original"), layers, model)
            begun = time.process_time()
            made = json.loads(run(
                "search", "--device", "cpu", "--model", model, "--bits", 5, "--methods", "awq",
                "--text", text, "--windows", windows * 3 // 4, "--held-out", windows // 4,
                "--json", "--out", Path(name) / "found.yaml",
            ))  # fmt: skip
            found[f"{layers} {windows}"] = {
                "weights": made["point"]["rank_bytes"], "layers": layers, "windows": windows,
                "cpu": time.process_time() - begun,
            }  # fmt: skip
    return found


def _shortened(model: Path, layers: int, out: Path) -> None:
    """A model with the first layers of another one."""
    out.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).symlink_to(model / name)
    tensors = load_file(model / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, out / "model.safetensors", {"format": "pt"})


def table(made: dict[str, Any]) -> str:
    """Markdown of what scores cost."""
    lines = ["| decoder layers | windows of 128 tokens | processor time, s |", "|--:|--:|--:|"]
    lines += [f"| {x['layers']} | {x['windows']} | {x['cpu']:.0f} |" for x in made.values()]
    return "\n".join(lines)
