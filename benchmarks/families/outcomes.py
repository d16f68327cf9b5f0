"""What becomes of each newer family: it serves and agrees, loads right, or is refused."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.families import engine
from benchmarks.families.architectures import Architecture
from benchmarks.families.cells import NUM_STEPS
from benchmarks.families.checkpoints import make_checkpoint, prompt
from benchmarks.families.comparison import distance
from benchmarks.families.loaded import Values, compare
from benchmarks.families.newer import Newer
from benchmarks.families.processes import ChildError, forked
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.evaluate.server import free_port
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

Status = Literal["serves and agrees", "loads right", "refused", "failed"]

# how far the logits at the median position may be from transformers', as a part of their standard
# deviation: what two layers of rounding do, see "Left alone" in docs/families.md
_LIMITS = {"bf16": 0.03, "fp8": 0.2}


@dataclasses.dataclass
class Outcome:
    """What became of a family.

    Attributes:
        method: fp8; or bf16, where fp8 was refused.
        kept: pattern of layers that stayed bf16.
        refused: method -> why it was refused.
        unchecked: what the model without weights could not show.
        values: of the loaded model; None where it was not loaded.
        distances: method -> the distance of the engine's logits from transformers'.
        note: why it was not served.
        failures: what should not be.
    """

    family: str
    method: str = ""
    kept: str = ""
    refused: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unchecked: str = ""
    values: Values | None = None
    distances: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> Status:
        """In a word."""
        if self.failures:
            return "failed"
        if not self.method:
            return "refused"
        return "serves and agrees" if self.distances else "loads right"


def outcome_of(newer: Newer, folder: Path) -> Outcome:
    """Plan, load and serve a family in forked children; what fails is in the outcome."""
    start = time.perf_counter()
    made = Outcome(newer.architecture.name, kept=newer.kept, note=newer.not_on_cpu)
    try:
        _find_out(made, newer, folder)
    except ChildError as error:
        made.failures.append(str(error))
    made.seconds = time.perf_counter() - start
    return made


def _find_out(made: Outcome, newer: Newer, folder: Path) -> None:
    architecture = newer.architecture
    (path,) = forked([functools.partial(make_checkpoint, architecture, folder)], folder)
    presets = {method: _preset(newer, method, folder) for method in _LIMITS}
    for method in ("fp8", "bf16"):
        (found,) = forked([functools.partial(_planned, path, presets[method])], folder)
        refused, made.unchecked = found
        if not refused:
            made.method = method
            break
        made.refused[method] = refused
    if not made.method:
        return
    (made.values,) = forked([functools.partial(compare, path, presets[made.method])], folder)
    made.failures += made.values.faults
    if newer.not_on_cpu:
        if made.values.unread:
            made.failures.append(f"nothing to compare with: {made.values.unread}")
        return
    for method in dict.fromkeys((made.method, "bf16")):
        work = functools.partial(_serve, path, presets[method], free_port())
        (served,) = forked([work], folder)
        forced = served["tokens"][:-1]
        (expected,) = forked([functools.partial(_reference, architecture, path, forced)], folder)
        near = distance(served["logits"], expected, NUM_STEPS + 1)
        made.distances[method] = near.error
        if not near.error <= _LIMITS[method]:
            made.failures.append(
                f"logits in {method} are {near.error:.3f} from transformers' (expected "
                f"{_LIMITS[method]} or less)"
            )


def _preset(newer: Newer, method: str, folder: Path) -> Path:
    rules = [f'  - {{match: "{newer.architecture.layers}", method: {method}}}']
    if newer.kept and method != "bf16":
        rules.append(f'  - {{match: "{newer.kept}", method: bf16}}')
    path = folder / f"{newer.architecture.config_class}-newer-{method}.yaml"
    path.write_text("\n".join(["version: 1", "rules:", *rules, ""]), encoding="utf-8")
    return path


def _planned(path: Path, preset: Path) -> tuple[list[str], str]:
    """Why a plan is refused, by itself or by the model without weights; and what is not known."""
    from mixedprec_plugin.serving.alone import outline_alone

    try:
        plan = resolve_plan(load_preset(preset), open_source(path), Target("cpu"))
        outline = None if plan.errors else outline_alone(plan)
    except MixedPrecisionError as error:
        return [str(problem) for problem in error.problems], ""
    if outline is None:
        return [str(problem) for problem in plan.errors], ""
    return [str(problem) for problem in outline.problems], outline.unchecked


def _serve(path: Path, preset: Path, port: int) -> dict[str, Any]:
    args = engine.server_args(path, preset, 1)
    return engine.serve(args, port, 0, prompt(), NUM_STEPS, [], is_traced=False)


def _reference(architecture: Architecture, path: Path, forced: list[int]) -> torch.Tensor:
    """Logits of transformers in bf16, of the prompt and the tokens after it."""
    import transformers

    model_class: Any = getattr(transformers, architecture.model_class)
    model = model_class.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([prompt() + forced])).logits[0].float()
    return logits
