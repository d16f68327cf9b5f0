"""What `quantization_config` says of one layer, its ignore lists and overrides applied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mixedprec_plugin.errors import CheckpointError, Problem

# float is what `stored.UNQUANTIZED` says
_UNQUANTIZED = "float"
_NOT_IN_BLOCKS = re.compile(r"\D*")
_NEVER_PROMISED = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|embed_tokens|wte|wpe|\w*norm\w*|router|shared_expert_gate"
    r"|(?:mlp|block_sparse_moe)\.gate)$"
)
_IGNORE_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
_SCALE_METHODS = {"row": "channel", "tensor": "tensor", "block": "block"}


@dataclasses.dataclass(frozen=True)
class Promise:
    """What config.json says of one layer.

    Attributes:
        family: as `StoredFormat.family`; None where it says nothing that could be held against
            tensors.
        facts: as `StoredFormat.said`; only what is said.
        format: the format's own name for people, such as `float-quantized`; may be empty.
        config: the whole `quantization_config`.
    """

    family: str | None
    facts: Mapping[str, Any]
    format: str
    config: Mapping[str, Any]


def promise_of(config: Mapping[str, Any], name: str) -> Promise:
    """Read what a `quantization_config` says of the layer `name`.

    Raises:
        CheckpointError: one of its patterns is no regular expression.
    """
    readers = {
        "awq": _awq, "gptq": _gptq, "fp8": _fp8, "blockwise_int8": _blockwise_int8,
        "fp8_channel": _fp8_channel, "w8a8_fp8": _fp8_channel,
        "compressed-tensors": _compressed, "auto-round": _auto_round, "auto_round": _auto_round,
        "intel/auto-round": _auto_round,
    }  # fmt: skip
    reader = readers.get(str(config.get("quant_method", "")).lower())
    family, facts, label = reader(config, name) if reader else (None, {}, "")
    if _is_unsaid(name):
        family = None
    elif family is not None and (ignored := _is_ignored(config, name)) is not False:
        family = _UNQUANTIZED if ignored else None
    return Promise(family, facts, label, config)


def tells_layers_apart(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` may say something else of two layers that differ in numbers.

    False where no pattern or ignored name in it has a digit or a class of digits.
    """
    keys = (*_IGNORE_KEYS, "dynamic", "extra_config", "block_name_to_quantize", "config_groups")
    # the names of groups themselves, `group_0`, say nothing of layers
    groups = config.get("config_groups")
    sections = [config.get(key) for key in keys[:-1]]
    sections += list(groups.values()) if isinstance(groups, Mapping) else []
    return any(
        character.isdigit() or character in "\\["
        for section in sections
        for text in _texts(section)
        for character in text
    )


def _texts(value: Any) -> Iterator[str]:
    """Every string in a value of config.json, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


_Read = tuple[str | None, dict[str, Any], str]


def _is_unsaid(name: str) -> bool:
    """Whether quantizers pass a layer over without saying so: all but blocks' linear layers."""
    outside = bool(name) and _NOT_IN_BLOCKS.fullmatch(name) is not None
    return outside or _NEVER_PROMISED.search(name) is not None


def _is_ignored(config: Mapping[str, Any], name: str) -> bool | None:
    """Whether a list leaves the layer out; None where tools read the entry differently.

    AutoAWQ looks for an entry anywhere in a name (`gate` in `gate_proj`), others for whole
    components.
    """
    entries = [str(e) for key in _IGNORE_KEYS for e in _strings(config.get(key))]
    for entry in entries:
        if entry.startswith("re:"):
            if _matches(entry[3:], name):
                return True
        elif f".{entry}." in f".{name}.":
            return True
    if config.get("quant_method") == "awq" and any(entry in name for entry in entries):
        return None
    return False


def _awq(config: Mapping[str, Any], _name: str) -> _Read:
    facts = _said(config, bits="bits", group_size="group_size", symmetric="sym")
    if "symmetric" not in facts and config.get("zero_point") is not None:
        facts["symmetric"] = not config["zero_point"]
    return "awq", facts, ""


def _gptq(config: Mapping[str, Any], name: str) -> _Read:
    keys = {"bits": "bits", "group_size": "group_size", "symmetric": "sym", "desc_act": "desc_act"}
    facts = _said(config, **keys)
    dynamic = config.get("dynamic")
    for pattern, override in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if _matches(pattern.removeprefix("+:").removeprefix("-:"), name):
            if pattern.startswith("-:"):
                return _UNQUANTIZED, facts, ""
            if isinstance(override, Mapping):
                facts |= _said(override, **keys)
            break
    return "gptq", facts, ""


def _fp8(config: Mapping[str, Any], _name: str) -> _Read:
    facts = _block_facts(config)
    method = config.get("weight_scale_method")
    if method in _SCALE_METHODS:
        facts["strategy"] = _SCALE_METHODS[method]
    return "fp8", facts, ""


def _fp8_channel(_config: Mapping[str, Any], _name: str) -> _Read:
    return "fp8", {"strategy": "channel", "inputs": {"dynamic": True, "group_size": None}}, ""


def _blockwise_int8(config: Mapping[str, Any], _name: str) -> _Read:
    return "int8", _block_facts(config), ""


def _block_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    block = _block(config.get("weight_block_size"))
    if not block:
        return {}
    # such layers' activations are quantized in groups as long as a block
    inputs = {"dynamic": config.get("activation_scheme") != "static", "group_size": block[1]}
    return {"block": block, "strategy": "block", "inputs": inputs}


def _auto_round(config: Mapping[str, Any], name: str) -> _Read:
    keys = {"bits": "bits", "group_size": "group_size", "symmetric": "sym"}
    facts = _said(config, **keys)
    blocks = config.get("block_name_to_quantize")
    within = blocks.split(",") if isinstance(blocks, str) else _strings(blocks)
    if within and name and not any(f"{name}.".startswith(f"{block}.") for block in within):
        return _UNQUANTIZED, facts, ""
    extra = config.get("extra_config")
    for pattern, override in extra.items() if isinstance(extra, Mapping) else ():
        if isinstance(override, Mapping) and (pattern == name or _matches(pattern, name, True)):
            facts |= _said(override, **keys)
    if facts.get("bits") in (16, 32):
        return _UNQUANTIZED, facts, ""
    families = {"auto_round:auto_awq": "awq", "auto_round:auto_gptq": "gptq"}
    packing = str(config.get("packing_format", ""))
    return families.get(packing), facts, packing


def _compressed(config: Mapping[str, Any], name: str) -> _Read:
    groups = config.get("config_groups")
    group = _group_of(groups, name) if isinstance(groups, Mapping) else None
    weights = group.get("weights") if group else None
    if group is None or not isinstance(weights, Mapping):
        return None, {}, ""
    label = str(group.get("format") or config.get("format") or "")
    kind = f"{weights.get('type', 'int')}{weights.get('num_bits', 8)}"
    families = {
        "pack-quantized": "pack-quantized",
        "float-quantized": "fp8",
        "int-quantized": "int8",
        "naive-quantized": {"float8": "fp8", "int8": "int8"}.get(kind),
        "dense": _UNQUANTIZED,
    }
    strategy, block = weights.get("strategy"), _block(weights.get("block_structure"))
    facts = _said(weights, bits="num_bits", symmetric="symmetric", strategy="strategy")
    if strategy == "group":
        facts |= _said(weights, group_size="group_size")
    elif strategy == "channel" and label == "pack-quantized":
        facts["group_size"] = -1
    elif strategy == "block" and block:
        facts["block"] = block
    if weights.get("actorder") in ("group", True):
        facts["desc_act"] = True
    inputs = group.get("input_activations")
    facts["inputs"] = (
        {"dynamic": inputs.get("dynamic") is True, "group_size": inputs.get("group_size")}
        if isinstance(inputs, Mapping)
        else None
    )
    return families.get(label), facts, label


def _group_of(groups: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The group of a layer: a target that names it goes before one that names its class."""
    found = None
    for group in groups.values():
        for target in _strings(group.get("targets")) if isinstance(group, Mapping) else ():
            if target == name or (target.startswith("re:") and _matches(target[3:], name)):
                return group if isinstance(group, Mapping) else None
            if target == "Linear" and found is None:
                found = group
    return found


def _said(config: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    """Fact -> value, for the keys that the config has."""
    return {fact: config[key] for fact, key in keys.items() if config.get(key) is not None}


def _block(value: Any) -> list[int] | None:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return list(value) if is_pair and all(isinstance(n, int) and n > 0 for n in value) else None


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else []


def _matches(pattern: str, name: str, whole: bool = False) -> bool:
    """Match as the tools do: from the start of the name, or the whole of it."""
    try:
        found = re.fullmatch(pattern, name) if whole else re.match(pattern, name)
    except re.error as error:
        raise CheckpointError(
            Problem(
                "config.json: quantization_config",
                f"{pattern!r} is no regular expression ({error})",
                "correct the pattern",
                "config-pattern",
            )
        ) from error
    return found is not None
