"""A mixture of experts that differ: single experts against whole layers, at equal bytes.

The demo's mixture (demo/experts.py) with the MLPs' copies perturbed apart and routers that prefer
some experts: their rows point along the mean of what they read, as far as an expert is preferred.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.calibration import run, texts
from demo.model import checkpoint

PROSE = Path(__file__).with_name("data") / "prose.txt"
# what is added to the logits of experts 0 to 3, and the noise of their weights beside these
PREFERRED = (2.0, 0.7, -0.7, -2.0)
_NOISE, _TOKENS = 0.1, 256


def write_skewed(out: Path) -> list[float]:
    """Write the mixture.

    Returns:
        the share of tokens that each expert of a layer sees, over all layers; they sum to 2.
    """
    plain = checkpoint("experts")
    tokens = AutoTokenizer.from_pretrained(plain)(PROSE.read_text(encoding="utf-8")).input_ids
    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".experts." in name:
            noise = torch.randn(tensor.shape, generator=generator)
            scale = _NOISE * tensor.float().square().mean().sqrt()
            tensors[name] = (tensor.float() + scale * noise).bfloat16()
    model: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    given = torch.tensor([tokens[:_TOKENS]])
    for index, (mean, _) in enumerate(_seen(model, given)):
        router = torch.randn(len(PREFERRED), len(mean), generator=generator) / mean.norm()
        router += torch.tensor(PREFERRED)[:, None] * mean / mean.square().sum()
        tensors[f"model.layers.{index}.block_sparse_moe.gate.weight"] = router.bfloat16()
    shutil.copytree(plain, out, ignore=shutil.ignore_patterns("model.safetensors", ".mixedprec"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    del model, tensors
    made: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    shares = [share for _, share in _seen(made, given)]
    return [float(x) for x in torch.stack(shares).mean(0)]


def _seen(model: Any, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, the mean of what its router reads, [H], and the share of each expert, [E]."""
    found = []

    def keep(router: Any, given: tuple[torch.Tensor, ...], _made: Any) -> None:
        states = given[0].reshape(-1, given[0].shape[-1]).float()
        top = (states @ router.weight.float().t()).topk(2).indices
        shares = torch.bincount(top.flatten(), minlength=len(router.weight)) / len(states)
        # the first token, on which the others lean, is a thousand times as large
        found.append((states[1:].mean(0), shares))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


def compare(folder: Path, bits: float, size: tuple[int, int]) -> dict[str, Any]:
    """Search both ways and measure; rounded as it is loaded, so that the bytes alone differ.

    Args:
        size: windows, and tokens of each, to measure on.
    Returns:
        "shares"; and of each way its bits, what it predicts, and KL on each text.
    """
    model = folder / "mixture"
    shares = folder / "shares.json"
    if not shares.exists():
        shutil.rmtree(model, ignore_errors=True)
        shares.write_text(json.dumps(write_skewed(model)))
    found: dict[str, Any] = {"shares": json.loads(shares.read_text()), "asked": bits}
    for way in ("single", "layer"):
        made = json.loads(run(
            "search", "--device", "cpu", "--model", model, "--bits", bits, "--experts", way,
            "--at-load", "--text", PROSE, "--windows", 1, "--held-out", 8, "--methods",
            "awq,gptq,int8_channel", "--json", "--out", folder / f"{way}.yaml",
        ))  # fmt: skip
        found[way] = {
            "bits": made["point"]["bits"], "bytes": made["point"]["rank_bytes"],
            "predicted": made["point"]["loss"],
        }  # fmt: skip
    presets = [word for way in ("single", "layer") for word in ("--preset", folder / f"{way}.yaml")]
    for title, text in texts(folder).items():
        options = ("--text", text, "--windows", size[0], "--length", size[1], "--json")
        rows = json.loads(run("eval", "--device", "cpu", "--model", model, *presets, *options))
        for way, row in zip(("single", "layer"), rows["rows"][1:], strict=True):
            found[way][title] = row["found"]["kl"]
    return found


def sentence(found: dict[str, Any]) -> str:
    """What came of it, as Markdown."""
    shares = ", ".join(f"{share:.0%}" for share in found["shares"])
    lines = [
        f"Experts see {shares} of the tokens. Rounded as it is loaded, {found['asked']:g} bits:",
        "", "| chosen for | bytes | predicted | KL, manual | KL, code |", "|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for way, title in (("single", "each expert"), ("layer", "all experts of a layer")):
        own = found[way]
        cells = [title, f"{own['bytes']:,}", f"{own['predicted']:.4f}"]
        cells += [f"{own[x]['value']:.4f} ± {own[x]['error']:.4f}" for x in ("manual", "code")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: the experiment as a part of the benchmark
part: Callable[[Path], dict[str, Any]] = functools.partial(compare, bits=5.0, size=(4, 256))
