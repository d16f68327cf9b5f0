"""Fused modules whose shards come from several sources, and `auto`, on SGLang's own Llama."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import PlanError
from mixedprec_plugin.methods.awq import codec as awq
from mixedprec_plugin.methods.fp8 import codec as fp8
from mixedprec_plugin.methods.gptq import codec as gptq
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama
from tests.presets import write_preset

LoadModel = Callable[..., Any]
BLOCK = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TENSOR = {"weight_block_size": None, "activation_scheme": "dynamic"}
AWQ = {"bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
QKV = "model.layers.1.self_attn"
Quantize = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def write_quantized(
    folder: Path, quantize: Quantize, match: str = "_proj", **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a Llama whose projections are quantized; returns its tensors."""
    config = llama_config(**changes)
    tensors = llama_tensors(config)
    for name in [n for n in tensors if match in n]:
        made = quantize(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in made.items()}
    write_checkpoint(folder, config, tensors)
    return tensors


def scaled(scale: float, arguments: dict[str, Any]) -> Quantize:
    """Quantize a multiple of a weight, so that sources differ in codes and scales."""
    return lambda weight: fp8.quantize(weight * scale, arguments, torch.bfloat16)


def mixed_preset(folder: Path, method: str, **sources: Path) -> Path:
    head = "sources: " + json.dumps({name: {"path": str(p)} for name, p in sources.items()}) + "\n"
    first, second = sources
    return write_preset(
        folder,
        f'match: "*.self_attn.q_proj", {method}, source: {first}',
        f'match: "*.self_attn.{{k,v}}_proj", {method}, source: {second}',
        head=head + "trust_sources: true\n",
    )


def dequantized(layer: Any) -> torch.Tensor:
    """The fused weight that a loaded layer multiplies by, from an identity."""
    method: Any = layer.quant_method
    eye = torch.eye(layer.input_size, dtype=torch.bfloat16)
    output: torch.Tensor = method.apply(layer, eye)
    return output.t().float()


@pytest.mark.parametrize("arguments", [TENSOR, BLOCK], ids=["tensor", "block"])
def test_fp8_shards_of_two_sources_keep_their_own_scales(
    load_model: LoadModel, tmp_path: Path, arguments: dict[str, Any]
) -> None:
    sizes = {"num_key_value_heads": 4}
    model = write_llama(tmp_path / "model", **sizes)
    stored = {
        name: write_quantized(tmp_path / name, scaled(scale, arguments), **sizes)
        for name, scale in (("a", 37.0), ("b", 1.0))
    }
    method = "method: fp8_block" if arguments is BLOCK else "method: fp8"
    preset = mixed_preset(tmp_path, method, a=tmp_path / "a", b=tmp_path / "b")
    qkv = load_model(model, preset).model.layers[1].self_attn.qkv_proj
    shards = [("a", "q"), ("b", "k"), ("b", "v")]
    suffix = "weight_scale_inv" if arguments is BLOCK else "weight_scale"
    scales = [stored[source][f"{QKV}.{shard}_proj.{suffix}"] for source, shard in shards]
    held = getattr(qkv, suffix).data
    assert torch.equal(held.flatten(), torch.cat([scale.flatten() for scale in scales]))
    assert scales[0].max() > 20 * max(scales[1].max(), scales[2].max())
    codes = [stored[source][f"{QKV}.{shard}_proj.weight"] for source, shard in shards]
    # not requantized to the largest scale, which would cost k and v five of their bits
    assert torch.equal(qkv.weight.data.float(), torch.cat([c.float() for c in codes]))
    expected = torch.cat([
        fp8.read({"weight": code, suffix: scale}, arguments).dequantize()
        for code, scale in zip(codes, scales, strict=True)
    ])  # fmt: skip
    assert torch.allclose(dequantized(qkv), expected, rtol=2**-7, atol=1e-6)


def test_shards_of_two_formats_are_one_module_once_they_are_repacked(
    load_model: LoadModel, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model")
    gptq_tensors = write_quantized(tmp_path / "a", lambda w: gptq.quantize(w, GPTQ, torch.bfloat16))
    awq_tensors = write_quantized(tmp_path / "b", lambda w: awq.quantize(w, AWQ, torch.bfloat16))
    preset = mixed_preset(tmp_path, "method: awq", a=tmp_path / "a", b=tmp_path / "b")
    qkv = load_model(model, preset).model.layers[1].self_attn.qkv_proj

    def of(tensors: dict[str, torch.Tensor], shard: str) -> dict[str, torch.Tensor]:
        prefix = f"{QKV}.{shard}_proj."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    expected = torch.cat([
        gptq.read(of(gptq_tensors, "q"), GPTQ).dequantize(),
        awq.read(of(awq_tensors, "k"), AWQ).dequantize(),
        awq.read(of(awq_tensors, "v"), AWQ).dequantize(),
    ])  # fmt: skip
    # AWQ multiplies in the model's dtype
    assert torch.allclose(dequantized(qkv), expected, rtol=2**-7, atol=1e-6)


def test_blocks_that_do_not_line_up_in_a_fused_module_are_refused(
    load_model: LoadModel, tmp_path: Path
) -> None:
    """192 rows of k end inside a block of the fused qkv; its one grid of scales has no place for
    them, wherever the shards come from."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 384}
    model = write_llama(tmp_path / "model", **sizes)
    for name in ("a", "b"):
        write_quantized(tmp_path / name, scaled(1.0, BLOCK), **sizes)
    preset = mixed_preset(tmp_path, "method: fp8_block", a=tmp_path / "a", b=tmp_path / "b")
    message = (
        r"self_attn\.k_proj, .*v_proj: N = 192 of a shard of its fused module is not a multiple of "
        r"128, the block size along N; use method: fp8_tensor"
    )
    with pytest.raises(PlanError, match=message):
        load_model(model, preset)
    # stored in blocks and asked for otherwise, it is rounded twice only where the preset says so
    again = mixed_preset(
        tmp_path, "method: fp8_tensor, requantize: true", a=tmp_path / "a", b=tmp_path / "b"
    )
    qkv = load_model(model, again).model.layers[1].self_attn.qkv_proj
    assert qkv.weight_scale.shape == (3,)


def test_ragged_shards_that_sglang_would_refuse_are_those_that_the_plan_refuses(
    sglang_context: object,
) -> None:
    """SGLang's own check of the fused module, for the shape of the test above."""
    from types import SimpleNamespace

    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

    config = Fp8Config(True, "dynamic", None, [128, 128])
    layer = SimpleNamespace(tp_group=None)
    sizes = (384, 384, 768, 768)
    Fp8LinearMethod.validate_block_quant_shapes(layer, config, *sizes, [384, 128, 256])
    with pytest.raises(ValueError, match="output_partition_size = 192 is not divisible"):
        Fp8LinearMethod.validate_block_quant_shapes(layer, config, *sizes, [384, 192, 192])


def compressed_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}


def test_auto_on_the_cpu_runs_our_methods_and_dequantizes_the_rest(
    load_model: LoadModel, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model")
    peers = Path(__file__).parents[1] / "data" / "peers"
    config = json.loads((peers / "llmcompressor-w8a8-int8/quantization_config.json").read_text())
    # INT8 weights beside activations in floats are no method's
    config["config_groups"]["group_0"]["input_activations"] = None
    int8 = write_quantized(tmp_path / "int8", compressed_int8, quantization_config=config)
    write_quantized(
        tmp_path / "awq", lambda w: awq.quantize(w, AWQ, torch.bfloat16), match=".mlp.",
        quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128,
                             "zero_point": True, "version": "gemm"},
    )  # fmt: skip
    paths = {name: {"path": str(tmp_path / name)} for name in ("int8", "awq")}
    preset = write_preset(
        tmp_path,
        'match: "*.self_attn.*", method: auto, source: int8',
        'match: "*.mlp.*", method: auto, source: awq',
        head=f"trust_sources: true\nsources: {json.dumps(paths)}\n",
    )
    layer = load_model(model, preset).model.layers[1]
    assert type(layer.self_attn.o_proj.quant_method).__name__ == "UnquantizedLinearMethod"
    codes, scale = (int8[f"{QKV}.o_proj.{s}"] for s in ("weight", "weight_scale"))
    expected = (codes.float() * scale.float()).to(torch.bfloat16)
    assert torch.equal(layer.self_attn.o_proj.weight.data, expected)
    assert type(layer.mlp.down_proj.quant_method).__name__ == "AWQLinearMethod"
