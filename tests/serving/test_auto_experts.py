"""Experts under `method: auto` on the CPU platform, in SGLang's own Mixtral."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file

from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.gptq import codec as gptq
from tests.checkpoints import write_checkpoint, write_mixtral
from tests.cpu.expert_layers import evaluate, relative_error, route
from tests.presets import write_preset
from tests.reference.dequantize import dequantize_checkpoint

LoadModel = Callable[..., Any]
Layer = dict[str, torch.Tensor]
SIZES = {"num_hidden_layers": 1, "intermediate_size": 384}
NUM_EXPERTS, HIDDEN = 4, 256
EXPERTS = "model.layers.0.block_sparse_moe.experts"
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "format": "pack-quantized", "input_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                    "group_size": 32, "dynamic": False, "actorder": None},
    }},
}  # fmt: skip
# what config.json says
CONFIGS: Mapping[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True,
            "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
    "packed": PACKED,
}  # fmt: skip
# format -> class of the method, and how far bf16 arithmetic and quantized activations may take it
RUNS = {
    "fp8": ("Fp8MoEMethod", 0.06),
    "awq": ("AWQMoEMethod", 0.01),
    "gptq": ("GPTQMarlinMoEMethod", 0.01),
    "packed": ("UnquantizedFusedMoEMethod", 0.01),
}


def packed(weight: torch.Tensor) -> Layer:
    """compressed-tensors' own compression."""
    scale = weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 7.5
    scheme = QuantizationScheme.model_validate(PACKED["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": weight, "weight_scale": scale.bfloat16()}
    made: Layer = compressor.compress(state, scheme)
    return {suffix: made[suffix] for suffix in ("weight_packed", "weight_scale", "weight_shape")}


QUANTIZERS: Mapping[str, Callable[[torch.Tensor], Layer]] = {
    "fp8": lambda w: fp8.quantize(w, {**CONFIGS["fp8"]}, torch.bfloat16),
    "awq": lambda w: awq.quantize(w, CONFIGS["awq"], torch.bfloat16),
    "gptq": lambda w: gptq.quantize(w, CONFIGS["gptq"], torch.bfloat16),
    "packed": packed,
}


def write_stored(folder: Path, form: str, unquantized: str = "(none)", **sizes: Any) -> Path:
    """Write a Mixtral whose experts are stored in a format, but for names with a certain text."""
    write_mixtral(folder, NUM_EXPERTS, **SIZES | sizes)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n and unquantized not in n]:
        made = QUANTIZERS[form](tensors.pop(name))
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in made.items()}
    config["quantization_config"] = CONFIGS[form]
    return write_checkpoint(folder, config, tensors)


def load_auto(load_model: LoadModel, folder: Path, form: str, *text: str, **sizes: Any) -> Any:
    """Load a model whose experts are taken from a source that stores them in a format."""
    model = write_mixtral(folder / "bf16", NUM_EXPERTS, **SIZES | sizes)
    stored = write_stored(folder / "stored", form, *text, **sizes)
    head = f"trust_sources: true\nsources: {{stored: {{path: {json.dumps(str(stored))}}}}}\n"
    rule = 'match: "*.experts.*", method: auto, source: stored'
    return load_model(model, write_preset(folder, rule, head=head))


def dequantized(model: Path, form: str) -> list[dict[str, np.ndarray]]:
    """Every expert's weights, by a reference that shares no code with the package."""
    tensors = load_file(model / "model.safetensors")

    def weight(name: str) -> np.ndarray:
        found = {
            n.removeprefix(f"{name}."): t.float().numpy() if t.is_floating_point() else t.numpy()
            for n, t in tensors.items()
            if n.startswith(f"{name}.")
        }
        if form == "fp8":
            scale = found["weight_scale_inv"].repeat(128, 0).repeat(128, 1)
            return (found["weight"] * scale).astype(np.float64)
        return dequantize_checkpoint(found, CONFIGS[form]).astype(np.float64)

    return [
        {shard: weight(f"{EXPERTS}.{expert}.{shard}") for shard in ("w1", "w2", "w3")}
        for expert in range(NUM_EXPERTS)
    ]


@pytest.mark.parametrize("form", RUNS)
def test_experts_compute_what_their_dequantized_weights_do(
    load_model: LoadModel, tmp_path: Path, form: str
) -> None:
    loaded = load_auto(load_model, tmp_path, form)
    layer = loaded.model.layers[0].block_sparse_moe.experts
    runs_as, limit = RUNS[form]
    assert type(layer.quant_method).__name__ == runs_as
    x = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(3)).bfloat16()
    topk = route(16, num_experts=NUM_EXPERTS, top_k=2)
    exact = evaluate(x, topk, dequantized(tmp_path / "stored", form))
    error = relative_error(layer(x.clone(), topk), exact)
    assert error < limit, error
    if form == "packed":
        up = torch.from_numpy(dequantized(tmp_path / "stored", form)[1]["w3"]).bfloat16()
        assert torch.equal(layer.w13_weight.data[1, SIZES["intermediate_size"] :], up)


def test_auto_fills_the_same_parameters_as_the_named_method(
    load_model: LoadModel, tmp_path: Path
) -> None:
    model = write_stored(tmp_path / "model", "fp8")
    layers = [
        load_model(model, write_preset(tmp_path / name, rule)).model.layers[0]
        for name, rule in (
            ("auto", 'match: "*", method: auto'),
            ("named", 'match: "*.experts.*", method: fp8_block'),
        )
    ]
    under_auto, named = (layer.block_sparse_moe.experts for layer in layers)
    assert type(under_auto.quant_method) is type(named.quant_method)
    found = dict(under_auto.named_parameters())
    assert found.keys() == dict(named.named_parameters()).keys()
    for name, parameter in named.named_parameters():
        assert torch.equal(found[name].view(torch.uint8), parameter.view(torch.uint8)), name


def test_layer_that_its_source_leaves_unquantized_is_served_so(
    load_model: LoadModel, tmp_path: Path
) -> None:
    loaded = load_auto(load_model, tmp_path, "awq", "layers.1.", num_hidden_layers=2)
    classes = [
        type(layer.block_sparse_moe.experts.quant_method).__name__ for layer in loaded.model.layers
    ]
    assert classes == ["AWQMoEMethod", "UnquantizedFusedMoEMethod"]


def test_experts_of_one_layer_that_are_not_alike_are_refused(
    load_model: LoadModel, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="runs all experts of a layer alike"):
        load_auto(load_model, tmp_path, "awq", "experts.3.")


def test_group_of_all_of_an_experts_inputs_is_the_group_that_the_config_names(
    load_model: LoadModel, tmp_path: Path
) -> None:
    """The down projection's 64 inputs are one group, the others' 256 are four."""
    loaded = load_auto(load_model, tmp_path, "gptq", intermediate_size=64)
    layer = loaded.model.layers[0].block_sparse_moe.experts
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(4)).bfloat16()
    topk = route(8, num_experts=NUM_EXPERTS, top_k=2)
    exact = evaluate(x, topk, dequantized(tmp_path / "stored", "gptq"))
    assert relative_error(layer(x.clone(), topk), exact) < 0.01
