"""Experts under `method: auto`, stored as other tools store layers, on a card that is played.

Each peer's format of `tests.dryrun.auto` in every expert of a layer, and what goes wrong with them.

python -m tests.dryrun.auto_experts H100 FOLDER
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.dryrun.cards import Card
from tests.dryrun.experts import HIDDEN, MODULE, NUM_EXPERTS
from tests.dryrun.journal import JOURNAL, outcome
from tests.dryrun.process import run_on_card

TP_SIZES = (1, 2)
INNER = 1024
_W4A16, _GPTQ = "llmcompressor-w4a16-g64", "gptqmodel-gptq-g64"
_DYNAMIC = {"+:.*experts.*": {"desc_act": True}}


def run_all(card: Card, shared: Path) -> dict[str, Any]:
    """Run every peer's format in a layer of experts."""
    from tests.checkpoint.peers import FOLDERS
    from tests.dryrun.auto import stand_in_for_zero_points

    stand_in_for_zero_points()
    found = {
        f"{peer} {tp_size}": run(card, peer, tp_size, shared / f"{peer}-{tp_size}")
        for peer in (*FOLDERS, "deepseek")
        for tp_size in TP_SIZES
    }
    for name, peer, tp_size, changes in (
        ("act order, in integers", _W4A16, 1, {"actorder": "group"}),
        ("groups of 128", _W4A16, 1, {"group_size": 128}),
        ("act order, in integers, two ranks", _W4A16, 2, {"actorder": "group"}),
        ("act order, by its other name", _W4A16, 1, {"actorder": "dynamic"}),
        ("weights in order, two ranks", _W4A16, 2, {"actorder": "weight"}),
        ("weights in static order, two ranks", _W4A16, 2, {"actorder": "static"}),
        ("dynamic act order", _GPTQ, 1, {"dynamic": _DYNAMIC}),
        ("ignored by its config", _W4A16, 1, {"ignore": ["re:.*experts.*"]}),
        ("unknown quant_method", _W4A16, 1, {"quant_method": "none_such"}),
        ("not Marlin's", "autoawq-g64", 1, {"version": None, "bits": None, "w_bit": 4}),
    ):
        found[name] = run(card, peer, tp_size, shared / name.replace(" ", "-"), **changes)
    for name, inner, tp_size in (("one group", 64, 1), ("half a group", 192, 2)):
        found[name] = run(card, _W4A16, tp_size, shared / name.replace(" ", "-"), inner=inner)
    return found


def run(
    card: Card, peer: str, tp_size: int, folder: Path, *, inner: int = INNER, **changes: Any
) -> dict[str, Any]:
    """Plan, build, load, process and run one layer of experts, and give it new weights.

    Returns:
        "runs_as", "kernels", "parameters" and "again", or what it was "refused" with, and
        "foretold" by the plan where it knows the card; or it is "broken".
    """
    from mixedprec_plugin.methods.cards import find_gpu
    from mixedprec_plugin.methods.interface import Target
    from tests.presets import plan

    write(folder, peer, inner, changes)
    rule = 'match: "*", method: auto'
    target = Target("cuda", tp_size, "BF16")
    known = dataclasses.replace(target, gpu=find_gpu(card.title))
    found: dict[str, Any] = {"foretold": [str(p) for p in plan(folder, rule, target=known).errors]}
    with outcome(found.__setitem__):
        found |= _run(card, plan(folder, rule, target=target).check(), inner)
    return found


def _run(card: Card, made: Any, inner: int) -> dict[str, Any]:
    import torch

    from mixedprec_plugin.compose.stream import VirtualCheckpoint
    from mixedprec_plugin.serving.config import MixedPrecisionConfig
    from mixedprec_plugin.serving.filling import load_weights
    from mixedprec_plugin.serving.late import check_built
    from tests.dryrun import experts
    from tests.dryrun.again import load_again
    from tests.dryrun.cells import check_filled, describe_parameters
    from tests.dryrun.fake_device import fake_card
    from tests.dryrun.rank import OneStage, rank

    config = MixedPrecisionConfig(made)
    dtype = getattr(torch, card.dtype)
    torch.set_default_dtype(dtype)
    with rank(made.target.tp_size), fake_card():
        model = experts.build(config, inner)
        check_built(config.plan, config.built, OneStage())
        load_weights(model, config, VirtualCheckpoint(made))
        parameters = describe_parameters(model)
        # scales are kept in the dtype that the model runs in
        cast = ("scale", "scale_inv", "scales", "qzeros", "weight_shape")
        check_filled(model, *cast)
        model.layer.quant_method.process_weights_after_loading(model.layer)
        JOURNAL.take_kernels()
        output = experts.forward(model.layer, dtype)
        assert (tuple(output.shape), output.dtype) == ((experts.NUM_TOKENS, HIDDEN), dtype), output
        return {
            "runs_as": experts.class_names(model.layer)[0],
            "kernels": JOURNAL.take_kernels(),
            "parameters": parameters,
            "again": load_again(model, config, *cast),
        }


def write(folder: Path, peer: str, inner: int, changes: Mapping[str, Any]) -> None:
    """Write a checkpoint of experts in a peer's format.

    Args:
        changes: keys of `quantization_config` to overwrite; `actorder` and `group_size` are of its
            weights, and change the tensors, too.
    """
    import torch
    from safetensors.torch import load_file

    from tests.checkpoint.peers import quantization_config
    from tests.checkpoints import write_checkpoint
    from tests.dryrun.auto import write as write_layers

    weights = {
        f"{MODULE}.{expert}.{name}_proj": (inner, HIDDEN) if name != "down" else (HIDDEN, inner)
        for expert in range(NUM_EXPERTS)
        for name in ("gate", "up", "down")
    }
    said = dict(changes)
    own = {key: said.pop(key) for key in ("actorder", "group_size") if key in said}
    if own:
        said["config_groups"] = quantization_config(peer)["config_groups"]
        said["config_groups"]["group_0"]["weights"] |= own
    write_layers(folder, peer, weights, said)
    if not own:
        return
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name, (_, K) in weights.items():
        if own.get("actorder") in ("group", "dynamic"):
            tensors[f"{name}.weight_g_idx"] = (torch.arange(K) // 64).int()
        if "group_size" in own:
            scales = tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight_scale"] = scales[:, : K // own["group_size"]].contiguous()
    write_checkpoint(folder, config, tensors)


if __name__ == "__main__":
    run_on_card(run_all)
