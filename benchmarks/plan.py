"""Seconds that it takes to plan the largest models, and memory.

    python -m benchmarks.plan [--plot FILE.svg]

The headers are those of published models (tests/published.py), the rules one for all experts, and
ten a layer that name twenty experts each. With --plot, Kimi-K2 of 1 to 90 blocks and of 1 to 600
rules are planned as well, and the seconds drawn. `start` is what each process of a server of a
model of a billion parameters does before it builds: imports, preset, headers, plan and checks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import Figure, keep
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.preset.model import Preset
from tests import published

_MODELS: dict[str, Callable[[], published.Published]] = {
    "DeepSeek-V3": published.deepseek_v3,
    "Kimi-K2": published.kimi_k2,
}
_REPEATS = 3
_DENSE = '  - {match: "*.self_attn.*", method: fp8}\n  - {match: "*.mlp.*", method: awq}\n'
_START = """
import json, sys, time
begin = time.perf_counter()
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.serving.planner import Planner
from mixedprec_plugin.serving.settings import Settings
imports, begin = time.perf_counter() - begin, time.perf_counter()
planner, settings = Planner(), Settings(sys.argv[2])
planner.plan(sys.argv[1], settings, "bfloat16", 1, "cpu").check()
plan, begin = time.perf_counter() - begin, time.perf_counter()
planner.plan(sys.argv[1], settings, "bfloat16", 1, "cpu")
print(json.dumps({"imports": imports, "plan": plan, "again": time.perf_counter() - begin}))
"""
# what it holds at most, in MiB; its resource usage would count pages of the process that began it
_PEAK = """
import re, sys
from pathlib import Path
from mixedprec_plugin.cli.main import main
assert main(["plan", "--model", sys.argv[1], "--preset", sys.argv[2]]) == 0
kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(int(kib) / 1024, file=sys.stderr)
"""
_ALL = '  - {match: "*.mlp.experts.*", method: gptq, requantize: true}\n'


def main(arguments: list[str] | None = None) -> int:
    """Plan each model by one rule and by many; 1 where that takes longer than it may."""
    parser = argparse.ArgumentParser(description="Seconds and memory of plans.")
    parser.add_argument("--plot", type=Path, help="file for the seconds over tensors and rules")
    options = parser.parse_args(arguments)
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, make in _MODELS.items():
            made = make()
            made.write(folder / model)
            for rules in (_ALL, _ALL + published.single_expert_rules(made)):
                preset = _preset(folder, rules)
                _, reading, planning = measure(folder / model, preset)
                name = f"{model}, rules: {len(preset.rules)}"
                figures.append(Figure(f"{name}, headers, s", reading))
                figures.append(Figure(f"{name}, headers and plan, s", reading + planning, limit=1))
        peak = _peak(folder / "Kimi-K2", folder / "preset.yaml")
        figures.append(Figure(f"{name}, peak of mixedprec plan, MiB", peak, limit=300))
        start = _start(folder)
        figures += [Figure(f"start, 1B, {part}, s", s) for part, s in start.items()]
        figures.append(Figure("start, 1B, s", sum(start.values()), limit=0.3))
        if options.plot:
            _draw(_scale(folder), options.plot)
    return int(not keep("plan", figures))


def _peak(model: Path, preset: Path) -> float:
    command = [sys.executable, "-c", _PEAK, str(model), str(preset)]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return float(done.stderr.split()[-1])


def _start(folder: Path) -> dict[str, float]:
    """Least seconds of a process's own work at a start, each of three processes."""
    _one_billion().write(folder / "1b")
    preset = folder / "preset.yaml"
    preset.write_text("version: 1\nrules:\n" + _DENSE, encoding="utf-8")
    command = [sys.executable, "-c", _START, str(folder / "1b"), str(preset)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(_REPEATS)
    ]
    return {part: min(run[part] for run in runs) for part in runs[0]}


def _one_billion() -> published.Published:
    """meta-llama/Llama-3.2-1B's shapes, by its config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "tie_word_embeddings": True,
        "vocab_size": 128256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("BF16", (128256, 2048)),
        "model.norm.weight": ("BF16", (2048,)),
    }
    shapes = {
        "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048), "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048), "mlp.down_proj": (2048, 8192),
        "input_layernorm": (2048,), "post_attention_layernorm": (2048,),
    }  # fmt: skip
    for layer in range(16):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = ("BF16", shape)
    return published.Published(config, tensors, 1)


def _scale(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(tensors, seconds) for models of more and more blocks, (rules, seconds) for more rules."""
    by_tensors, by_rules = [], []
    for num_blocks in (1, 30, 61, 90):
        made = published.kimi_k2(num_blocks)
        path = made.write(folder / f"{num_blocks}")
        num_tensors, reading, planning = measure(path, _preset(folder, _ALL))
        by_tensors.append((num_tensors, reading + planning))
    lines = published.single_expert_rules(published.kimi_k2()).splitlines(keepends=True)
    for count in (1, 150, 300, 600):
        rules = _ALL + "".join(lines[: count - 1])
        _, reading, planning = measure(folder / "Kimi-K2", _preset(folder, rules))
        by_rules.append((count, reading + planning))
    return {"by_tensors": by_tensors, "by_rules": by_rules}


def _draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    pairs = (("by_tensors", "tensors, one rule"), ("by_rules", "rules, Kimi-K2"))
    for each, (key, label) in zip(axes, pairs, strict=True):
        each.plot(*zip(*found[key], strict=True), marker="o")
        each.set(xlabel=label, ylim=(0, None), xlim=(0, None))
        each.grid(alpha=0.3)
    axes[0].set_ylabel("seconds of a core, headers and plan")
    figure.savefig(path, metadata={"Date": None})


def _preset(folder: Path, rules: str) -> Preset:
    path = folder / "preset.yaml"
    path.write_text(f"version: 1\nrules:\n{rules}", encoding="utf-8")
    return load_preset(path)


def measure(path: Path, preset: Preset) -> tuple[int, float, float]:
    """How many tensors there are, and least seconds of processor for headers and for the plan."""
    reading: list[float] = []
    planning: list[float] = []
    for _ in range(_REPEATS):
        start = time.process_time()
        source = open_source(path)
        reading.append(time.process_time() - start)
        start = time.process_time()
        plan = _plan(preset, source)
        planning.append(time.process_time() - start)
    assert not plan.errors, plan.errors[0]
    return len(source.tensors), min(reading), min(planning)


def _plan(preset: Preset, source: Source) -> Plan:
    return resolve_plan(preset, source, Target())


if __name__ == "__main__":
    raise SystemExit(main())
