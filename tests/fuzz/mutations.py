"""Changes of an input: of values and keys in JSON and YAML, of text, of bytes."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import yaml

Tree = Any
Path = tuple[str | int, ...]

_TEXTS = (
    "", " ", "\n", "\x1b[2J", "x\ud800", "\u202eab", "../../etc/passwd", "/dev/zero", "model",
    "a" * 5000, "NaN", "1e999", "-1", "0x10", "None", "${oc.env:HOME}", "${a}", "${" * 50,
    "re:(a+)+$", "re:[", "*", "{0..9}", "{0..99999999}", "[",
    "{{{{{{{{{a,b},c},c},c},c},c},c},c},c}", "layers.0-99999999",
    "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight",
    "lm_head", "???", "[/bold]", "%s", "\x00",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 3, 4, 8, 16, 64, 127, 128, 129, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63,
    1 << 64, -(1 << 63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 4.0, 1e-300, 1e300, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip
_WORDS_TEXT = """
    quantization_config compression_config quant_method bits w_bit group_size q_group_size sym
    desc_act zero_point version checkpoint_format modules_to_not_convert ignore ignored_layers
    exclude_modules dynamic lm_head config_groups targets weights input_activations
    output_activations num_bits type strategy symmetric format weight_block_size
    activation_scheme block_structure kv_cache_scheme sparsity_config transform_config
    extra_config packing_format quant_type text_config model_type architectures hidden_size
    num_hidden_layers num_experts num_local_experts head_dim tie_word_embeddings torch_dtype
    dtype shape data_offsets __metadata__ weight_map metadata preset layers names config rules
    match method scheme schemes source sources path revision lists extends optional requantize
    draft description on_fused_conflict trust_sources inputs files provenance file num_bytes
    sha256 apply location inverse randomize requires_grad precision rotation b_dtype
    weight_scale_group_size has_zero_point kv_cache scales rounding folded
"""
_WORDS = tuple(_WORDS_TEXT.split())
_VALUES_TEXT = """
    gptq awq fp8 fp8_channel blockwise_int8 bf16 auto int8 compressed-tensors mixedprec modelopt
    modelopt_fp4 torchao auto-round mxfp4 bitsandbytes gptq_v2 gemm marlin pack-quantized
    int-quantized float-quantized naive-quantized nvfp4-pack-quantized channel tensor block
    group token static Linear BF16 F16 F32 F64 F8_E4M3 F8_E5M2 F8_E8M0 F4 I4 I8 U8 I16 U16 I32
    U32 I64 U64 BOOL C64 bfloat16 float16 float32 llama LlamaForCausalLM deepseek_v3 qwen3_next
    gemma3 granitemoe hadamard random-hadamard random-matrix input output weight_input
    weight_output q_attn k_cache Embedding humming nvfp4 mxfp4 int8_channel uint3 uint6
    mxfp4-pack-quantized calibrated nearest
"""
_VALUES = tuple(_VALUES_TEXT.split())
_SUFFIXES_TEXT = """
    weight qweight qzeros scales g_idx bias weight_scale weight_scale_inv input_scale
    weight_packed weight_shape weight_zero_point weight_g_idx weight_global_scale k_scale
    v_scale pre_quant_scale smooth_factor channel_scale weight_scale_2 SCB
    R4_input.weight v_input.weight v_input.perm u_output.weight
"""
_SUFFIXES = tuple(_SUFFIXES_TEXT.split())
_YAML = (
    "&a ", "*a", "<<: ", "!!python/name:os.system ", "!x ", "? ", "- ", ": ", "\t", "---\n",
    "...\n", "%YAML 1.1\n", "|\n", ">\n", "'", '"', "{", "}", "[", "]", ",", "#", "\r", "\x85",
    "\u2028", "${", "}", "${oc.env:X,", "\\", "0o7", "0x_", "1_0", "1:2", ".inf", "yes",
    "2024-01-01", "~", "null", "\ufeff", "\x00", "{0..9}", "[!a]", "*" * 40,
    "1" + ":59" * 400 + ".5", "\\U00110000",
)  # fmt: skip


def odd_value(rng: random.Random, depth: int = 0) -> Tree:
    """A value of any kind."""
    kind = rng.randrange(10)
    if kind < 2:
        return rng.choice(_TEXTS)
    if kind < 4:
        return rng.choice(_NUMBERS)
    if kind < 6:
        return rng.choice((*_VALUES, *_WORDS))
    if kind == 6:
        return rng.choice((None, True, False))
    if depth > 2:
        return rng.choice(([], {}, [[]], {"": None}))
    if kind == 7:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {
            rng.choice((*_WORDS, *_TEXTS)): odd_value(rng, depth + 1)
            for _ in range(rng.randrange(3))
        }
    deep: Tree = odd_value(rng, depth + 1)
    for _ in range(rng.choice((1, 2, 33, 300))):
        deep = [deep] if rng.randrange(2) else {rng.choice(_WORDS): deep}
    return deep


def _paths(tree: Tree) -> list[Path]:
    """The paths of everything below the root; of long lists and mappings, some."""
    found: list[Path] = []
    stack: list[tuple[Path, Tree]] = [((), tree)]
    while stack and len(found) < 2000:
        path, value = stack.pop()
        found.append(path)
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        stack.extend(((*path, key), item) for key, item in items)
    return found[1:]


def _at(tree: Tree, path: Path) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def change_tree(rng: random.Random, tree: Tree) -> Tree:
    """A copy of plain data with one thing changed."""
    tree = copy.deepcopy(tree)
    paths = _paths(tree)
    if not paths or rng.randrange(200) == 0:
        return odd_value(rng)
    # shallow parts are few, and decide most
    path = rng.choice(paths if rng.randrange(2) else [path for path in paths if len(path) < 3])
    parent, key = _at(tree, path[:-1]), path[-1]
    old = parent[key]
    match rng.randrange(11):
        case 0 | 1:
            parent[key] = odd_value(rng)
        case 2:
            del parent[key]
        case 3 if isinstance(parent, dict):
            parent[changed_text(rng, str(key))] = parent.pop(key)
        case 4:
            parent[key] = copy.deepcopy(_at(tree, rng.choice(paths)))
        case 5:
            parent[key] = [old] if rng.randrange(2) else {rng.choice(_WORDS): old}
        case 6 if isinstance(old, dict):
            old[rng.choice((*_WORDS, *_SUFFIXES))] = odd_value(rng)
        case 6 if isinstance(old, list):
            old.insert(rng.randint(0, len(old)), odd_value(rng))
        case 7 if isinstance(old, int | float):
            parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, str(old), bool(old)))
        case 8 if isinstance(old, str):
            parent[key] = changed_text(rng, old)
        case 9 if isinstance(parent, dict):
            parent[rng.choice((*_WORDS, *_SUFFIXES))] = old
        case 9 if isinstance(parent, list):
            parent.extend([old] * rng.choice((1, 2, 300)))
        case _:
            parent[key] = rng.choice((*_VALUES, *_NUMBERS, *_TEXTS))
    return tree


def changed_text(rng: random.Random, text: str) -> str:
    """A text with one thing changed: a letter, a part between dots, or all of it."""
    at = rng.randint(0, len(text))
    parts = text.split(".")
    match rng.randrange(7):
        case 0:
            return (
                text[:at]
                + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x3000))))
                + text[at + 1 :]
            )
        case 1:
            return text[:at] + text[at + 1 :]
        case 2:
            return text[:at] + rng.choice((*_YAML, *_TEXTS)) + text[at:]
        case 3:
            parts[rng.randrange(len(parts))] = rng.choice(
                (*_SUFFIXES, "0", "-1", "99999999999", "", "experts")
            )
            return ".".join(parts)
        case 4:
            parts[-1] = rng.choice(_SUFFIXES)
            return ".".join(parts)
        case 5:
            return text[:at] * rng.choice((1, 2, 50)) + text[at:]
        case _:
            return rng.choice((*_TEXTS, *_VALUES, *_WORDS))


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Text or bytes with one thing changed."""
    at, end = sorted((rng.randint(0, len(raw)), rng.randint(0, len(raw))))
    match rng.randrange(9):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        case 2:
            return raw[:at] + raw[end:]
        case 3:
            return raw[:end] + raw[at:]
        case 4:
            return raw[:at] + rng.choice(_YAML).encode() + raw[at:]
        case 5:
            many = rng.choice(
                (b"[", b'{"a":', b"9", b" ", b"\n", b"- ", b"? ", b"a.", b"\xff", b"${")
            )
            return raw[:at] + many * rng.choice((3, 100, 5000)) + raw[at:]
        case 6:
            # a key that stands there twice
            word = json.dumps(rng.choice((*_WORDS, *_SUFFIXES)))
            return raw.replace(b"{", b"{" + word.encode() + b": 1, ", rng.randint(1, 3))
        case 7:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\n\n")) + raw
        case _:
            number = str(rng.choice(_NUMBERS)).encode()
            digits = [n for n, byte in enumerate(raw) if byte in b"0123456789"]
            spot = rng.choice(digits) if digits else at
            return raw[:spot] + number + raw[spot + 1 :]


def change_json(rng: random.Random, raw: bytes) -> bytes:
    """JSON with one thing changed, its text where it is none any longer."""
    try:
        tree = json.loads(raw) if rng.randrange(6) else None
    except (ValueError, RecursionError):
        tree = None
    return (
        json.dumps(change_tree(rng, tree)).encode()
        if isinstance(tree, dict)
        else change_bytes(rng, raw)
    )


def change_yaml(rng: random.Random, raw: bytes) -> bytes:
    """A preset with one thing changed."""
    try:
        tree = yaml.load(raw, yaml.CSafeLoader) if rng.randrange(2) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        return change_bytes(rng, raw)
    tree = change_tree(rng, tree)
    text = json.dumps(tree) if rng.randrange(2) else yaml.safe_dump(tree)
    return text.encode("utf-8", "replace")


_SIZES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "BOOL": 1, "BF16": 2, "F16": 2, "I16": 2,
          "F32": 4, "I32": 4, "I64": 8, "F64": 8}  # fmt: skip


def change_tensors(rng: random.Random, raw: bytes, data: bytes) -> tuple[bytes, bytes]:
    """A safetensors file with one tensor changed, and all offsets right.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    header = json.loads(raw[8:])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = dict(header[name])
    shape = list(entry["shape"])
    match rng.randrange(8):
        case 0:
            del header[name]
        case 1 | 2:
            header[changed_text(rng, name)] = header.pop(name)
        case 3:
            header[changed_text(rng, name)] = entry
        case 4:
            header[f"{name.rpartition('.')[0]}.{rng.choice(_SUFFIXES)}"] = entry
        case 5:
            entry["dtype"] = rng.choice(list(_SIZES))
        case 6:
            entry["shape"] = rng.choice((shape[::-1], [*shape, 1], shape[1:], [1, *shape], [], [0]))
        case _ if shape:
            at = rng.randrange(len(shape))
            shape[at] = max(0, rng.choice((shape[at] + 1, shape[at] - 1, shape[at] * 2, 1, 0, 3)))
            entry["shape"] = shape
    if name in header:
        header[name] = entry
    return _laid_out(header, data)


def _laid_out(header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    """Put tensors one behind another; of those whose size has changed, the bytes are repeated."""
    pieces: list[bytes] = []
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = math.prod(entry["shape"]) * _SIZES[entry["dtype"]]
            first, last = entry["data_offsets"]
            old = data[first:last] or b"\x80\x3c"
            num = min(size, 1 << 22)
            pieces.append((old * (num // len(old) + 1))[:num])
            header[name] = {**entry, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, b"".join(pieces)


def change_head(rng: random.Random, raw: bytes) -> bytes:
    """The header of a safetensors file with one thing changed; sometimes its length is wrong."""
    length, text = raw[:8], raw[8:]
    if rng.randrange(20) == 0:
        return rng.choice(_NUMBERS[:15]).to_bytes(8, "little", signed=True) + text  # type: ignore[union-attr]
    text = change_json(rng, text)
    return (len(text).to_bytes(8, "little") if rng.randrange(20) else length) + text
