"""Valid inputs to begin with: layers of other tools, models of several families, what we write."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.convert import converter
from mixedprec_plugin.resources import preset_dir, preset_names
from tests.checkpoint.peers import FOLDERS, quantization_config
from tests.fuzz.case import Case
from tests.quantize.peers import FILE, PEERS

Files = dict[str, tuple[bytes, ...]]
Header = Mapping[str, tuple[str, tuple[int, ...]]]

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I32": 4}
# checkpoints whose layers are multiplied by matrices as they run
TRANSFORMS = Path(__file__).parents[1] / "data" / "transforms"
H, F, V = 128, 256, 64

PRESETS = (
    'version: 1\nrules:\n  - {match: "*.mlp.*", method: fp8, weight_block_size: [128, 128]}\n',
    'version: 1\nrules:\n  - {match: "*", method: bf16}\n',
    'version: 1\nrules:\n  - {match: "*", method: auto}\n',
    'version: 1\nrules: [{match: "*", method: gptq, group_size: 64, requantize: true}]\n',
    'version: 1\nrules: [{match: "*", method: humming, bits: 5, group_size: 64}]\n',
    'version: 1\nrules: [{match: "*.experts.*", method: mxfp4, rounding: nearest}]\n'
    "kv_cache: {dtype: fp8_e4m3, scales: model}\n",
    "version: 1\n"
    "description: all of the language, by ${oc.env:HOME,nobody}\n"
    "extends: [parent, fp8-channel]\n"
    "lists: {hot: [0, '1..2', 7], names: ['*.q_proj', '*.k_proj']}\n"
    "schemes:\n"
    "  a: {method: awq, group_size: 32}\n"
    "  b: ${schemes.a}\n"
    "  c: {method: gptq, bits: 8, group_size: -1, desc_act: false, sym: true}\n"
    "sources: {other: {path: model}}\n"
    "on_fused_conflict: highest\n"
    "trust_sources: true\n"
    "rules:\n"
    "  - {match: '*.layers.{0..1}.*', scheme: b}\n"
    "  - {match: ['*.experts.${lists.hot}.*', '*.[qk]_proj'], scheme: c, optional: true}\n"
    "  - {match: '${lists.names}', method: '${schemes.a.method}', source: other, optional: true}\n"
    "  - {match: '*.layers.-1.mlp.*', method: int8, optional: true}\n"
    "draft: {rules: [{match: '*.mlp.*', method: fp8}]}\n",
)
PARENT = 'version: 1\nrules:\n  - {match: "*.self_attn.*", method: fp8}\n'


def config(**changes: Any) -> dict[str, Any]:
    """config.json of a small Llama."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H,
        "intermediate_size": F, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "num_hidden_layers": 2, "vocab_size": V, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, **changes,
    }  # fmt: skip


def llama(*, bias: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a model of two layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, H)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, out, into in (
            ("self_attn.q_proj", H, H), ("self_attn.k_proj", 64, H), ("self_attn.v_proj", 64, H),
            ("self_attn.o_proj", H, H), ("mlp.gate_proj", F, H), ("mlp.up_proj", F, H),
            ("mlp.down_proj", H, F),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (out, into)
            if bias and "self_attn" in name:
                shapes[f"{prefix}{name}.bias"] = (out,)
        shapes |= {f"{prefix}input_layernorm.weight": (H,)}
        shapes |= {f"{prefix}post_attention_layernorm.weight": (H,)}
    return {name: ("BF16", shape) for name, shape in {**shapes, "model.norm.weight": (H,)}.items()}


def experts(prefix: str, names: tuple[str, str, str], router: str) -> Header:
    """A model whose MLPs are two experts each."""
    tensors = {name: spec for name, spec in llama().items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.{prefix}."
        tensors[f"{block}{router}.weight"] = ("BF16", (2, H))
        for expert in range(2):
            for name, shape in zip(names, ((F, H), (H, F), (F, H)), strict=True):
                tensors[f"{block}experts.{expert}.{name}.weight"] = ("BF16", shape)
    return tensors


def fused_experts() -> Header:
    """A model whose experts lie in one tensor."""
    tensors = {name: spec for name, spec in llama().items() if ".mlp." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp."
        tensors[f"{block}gate.weight"] = ("BF16", (2, H))
        tensors[f"{block}experts.gate_up_proj"] = ("BF16", (2, 2 * F, H))
        tensors[f"{block}experts.down_proj"] = ("BF16", (2, H, F))
    return tensors


def mxfp4() -> Header:
    """Experts as gpt-oss stores them."""
    tensors = dict(fused_experts())
    for name in [name for name in tensors if ".experts." in name]:
        _, (count, out, into) = tensors.pop(name)
        tensors[f"{name}_blocks"] = ("U8", (count, out, into // 32, 16))
        tensors[f"{name}_scales"] = ("U8", (count, out, into // 32))
        tensors[f"{name}_bias"] = ("BF16", (count, out))
    return tensors


def humming() -> Header:
    """Projections of 6 bits, as humming-kernels stores them."""
    tensors = dict(llama(bias=True))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        _, (out, into) = tensors[name]
        tensors[name] = ("I32", (out, into * 6 // 32))
        tensors[f"{name}_scale"] = ("BF16", (out, into // 64))
    return tensors


def weights(tensors: Header) -> tuple[bytes, bytes]:
    """Header and bytes of a safetensors file in which every weight is the same."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw, b"\x80\x3c" * (end // 2)


def model(said: dict[str, Any], tensors: Header, parts: int = 1) -> Files:
    """A checkpoint's files, with an index where they are several."""
    files: Files = {"model/config.json": (json.dumps(said).encode(),)}
    if parts == 1:
        return {**files, "model/model.safetensors": weights(tensors)}
    places: dict[str, str] = {}
    names = list(tensors)
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        files[f"model/{file}"] = weights({name: tensors[name] for name in names[part::parts]})
        places |= dict.fromkeys(names[part::parts], file)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    return {**files, "model/model.safetensors.index.json": (index,)}


def split(raw: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and its data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[:end], raw[end:]


def peer(folder: str, **changes: Any) -> Files:
    """Layers that another tool quantized."""
    files: Files = {"model/model.safetensors": split((PEERS / folder / FILE).read_bytes())}
    said = config(architectures=["SliceOfALlama"], quantization_config=quantization_config(folder))
    files["model/config.json"] = (json.dumps({**said, **changes}).encode(),)
    return files


def models() -> Iterator[Files]:
    """Checkpoints of every format and of several families."""
    yield model(config(), llama())
    yield model(config(attention_bias=True, model_type="qwen2"), llama(bias=True), parts=2)
    mixtral = experts("block_sparse_moe", ("w1", "w2", "w3"), "gate")
    said = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    yield model(config(**said, num_local_experts=2, num_experts_per_tok=1), mixtral)
    qwen = experts("mlp", ("gate_proj", "down_proj", "up_proj"), "gate")
    said = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    yield model(config(**said, num_experts=2, moe_intermediate_size=F), qwen, parts=2)
    yield model({"text_config": config(), "architectures": ["Llama4ForConditionalGeneration"],
                 "model_type": "llama4"}, fused_experts())  # fmt: skip
    oss = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    yield model(config(**oss, quantization_config={"quant_method": "mxfp4"}), mxfp4())
    said = {"quant_method": "humming", "b_dtype": "uint6", "weight_scale_group_size": 64}
    yield model(config(model_type="qwen2", quantization_config=said), humming())
    for folder in FOLDERS:
        yield peer(folder)
    for path in sorted(TRANSFORMS.glob("*/config.json")):
        whole = split((path.parent / "model.safetensors").read_bytes())
        yield {"model/config.json": (path.read_bytes(),), "model/model.safetensors": whole}
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}  # fmt: skip
    fp8 = {name: ("F8_E4M3" if "_proj." in name else "BF16", spec[1])
           for name, spec in llama().items()}  # fmt: skip
    for name in [name for name in fp8 if "_proj." in name]:
        fp8 |= {f"{name}_scale": ("F32", ()), name.replace("weight", "input_scale"): ("F32", ())}
    yield {**model(config(), fp8), "model/hf_quant_config.json": (json.dumps(modelopt).encode(),)}


def converted(folder: Path) -> Iterator[Files]:
    """What `mixedprec convert` writes into a folder: finished, and stopped before the end."""
    case = Case((), {**model(config(), llama()), "preset.yaml": (PRESETS[0].encode(),)})
    for is_stopped in (False, True):
        case.write(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            if is_stopped:
                patch.setattr(converter, "_publish", _stop)
            with_parts = ["--max-shard-size", "300KB", "--device", "cpu", "--preset", "preset.yaml"]
            with contextlib.suppress(_StoppedError):
                converter_main(["convert", "--model", "model", "--out", "out", *with_parts])
        found: Files = {}
        for path in sorted((folder / "out").rglob("*")):
            raw = path.read_bytes() if path.is_file() else b""
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                found[name] = split(raw) if path.suffix == ".safetensors" else (raw,)
        if not is_stopped:
            yield {name.replace("out/", "model/", 1): pieces for name, pieces in found.items()}
        yield {**case.files, **found}


class _StoppedError(Exception):
    """The conversion is stopped here."""


def _stop(*_: object) -> None:
    raise _StoppedError


def converter_main(argv: list[str]) -> None:
    """Run `mixedprec`, which must succeed."""
    from tests.commands import run

    code, _, err = run(*argv)
    assert code == 0, err


def presets() -> list[bytes]:
    """Presets that use all of the language, and those that ship."""
    shipped = [(preset_dir() / f"{name}.yaml").read_bytes() for name in preset_names()]
    return [*(text.encode() for text in PRESETS), *shipped]


ARGUMENTS = (
    (), (), ("--tp", "2"), ("--device", "cpu"), ("--dtype", "float16"), ("--gpu", "H100"),
    ("--gpu", "8.0"), ("--set", "rules.0.method=awq"), ("--draft-model", "model"),
)  # fmt: skip
OVERRIDES = (
    "rules.0.method=awq", "rules[0].match=*.mlp.*", "rules.0.group_size=64", "schemes.a.bits=8",
    "rules.0.method=humming_int3",
    "schemes.a={method: fp8}", "schemes.b=${schemes.a}", "lists.hot=[1, 2]", "sources.s.path=model",
    "rules.0.source=s", "description=${oc.env:HOME}", "version=1", "on_fused_conflict=highest",
    "draft.rules.0.method=awq", "rules=[]", "extends=awq",
)  # fmt: skip


def seeds(folder: Path) -> list[Files]:
    """Every checkpoint; `folder` is where the inputs will lie."""
    return [*models(), *converted(folder)]
