"""Scales of the KV cache: which checkpoint they come from, as the preset's `kv_cache` says.

They stay with the layers that hold them where it says nothing. SGLang uses them where the cache is
in FP8, one for the keys and one for the values of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.names import is_in_decoder, kv_scale, parent_of
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.conversion import Conversion
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.preset.model import KvCache, Preset

# the layers that compute keys, and those that compute them among others
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "W_pack")
_CALIBRATED = MappingProxyType({"k_scale": TensorSpec("F32", ()), "v_scale": TensorSpec("F32", ())})


class KvScales:
    """The tensors of layers with the scales that a preset asks for.

    Attributes:
        source: that the scales come from; None where they stay with the layers, or are left out.
        alone: names of layers of the source that hold scales and nothing else of the model's.
    """

    def __init__(
        self,
        asked: KvCache,
        sources: Mapping[str, Source],
        names: Collection[str],
        drafts: Collection[str],
    ) -> None:
        self._asked, self._keeps = asked, asked.scales is None
        self.source = sources[asked.scales] if asked.scales else None
        self._held = _held(self.source) if self.source is not None else {}
        known = set(names)
        self.alone = tuple(name for name in self._held if name not in known)
        if asked.calibrates:
            # as SGLang spells them; no layer of a model's own has this name
            keys = [n for n in names if is_in_decoder(n, _KEYS) and n not in drafts]
            attentions = map(parent_of, keys)
            self.alone = tuple(f"{name}.attn" for name in dict.fromkeys(attentions))

    def conversion(self, name: str) -> Conversion | None:
        """What a conversion computes from text, if a layer is only that."""
        if not self._asked.calibrates or name not in self.alone:
            return None
        size = sum(spec.num_bytes for spec in _CALIBRATED.values())
        return Conversion("calibrate", _CALIBRATED, 0, size)

    def of(self, name: str, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """Suffix -> tensor of a layer, its scales exchanged for those that are asked for."""
        if self._keeps:
            return tensors
        own = {s: t for s, t in tensors.items() if kv_scale(f"{name}.{s}") is None}
        return {**own, **self._held.get(name, {})}

    def problems(self, preset: Preset) -> list[Problem]:
        """What is wrong with the source that is asked for."""
        where = f"{preset.path}: kv_cache.scales"
        found, calibrates = [], self._asked.calibrates
        if calibrates and self._asked.dtype not in ("auto", "fp8_e4m3"):
            what = f"calibrate beside dtype: {self._asked.dtype} (expected fp8_e4m3)"
            found.append((what, "scales are made for that dtype alone"))
        if calibrates and not self.alone:
            what = "calibrate: no attention layer caches the keys and values of its own projections"
            found.append((what, "leave scales out"))
        if self.source is not None and not self._held:
            what = (
                f"source {self.source.name!r} ({self.source.path}) holds no scales of the KV cache"
            )
            found.append((what, "name another source, or leave scales out"))
        return [Problem(where, what, remedy, "kv-scales") for what, remedy in found]


def _held(source: Source) -> dict[str, dict[str, StoredTensor]]:
    """Layer name -> suffix -> scale."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in source.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if kv_scale(name) is not None:
            found.setdefault(layer, {})[suffix] = tensor
    return found


def kv_cache_line(plan: Plan) -> str:
    """Say what becomes of the KV cache; empty where there is nothing to say."""
    asked, (count, sources) = plan.preset.kv_cache, _found(plan)
    if asked == KvCache() and not count:
        return ""
    dtype = f"in {asked.dtype}" if asked.dtype != "auto" else "as --kv-cache-dtype says"
    where = ", ".join(sources)
    scales = f"scales of {count} attention layers from {where}" if count else "no scales"
    if made := len(plan.calibrated_attentions):
        scales = f"scales of {made} attention layers, which mixedprec convert computes from text"
    return f"KV cache {dtype}, {scales}"


def kv_cache_as_dict(plan: Plan) -> dict[str, object]:
    """Its dtype, how many attention layers have scales, and the sources that hold these."""
    count, sources = _found(plan)
    return {"dtype": plan.preset.kv_cache.dtype, "attentions": count, "sources": sources}


def _found(plan: Plan) -> tuple[int, list[str]]:
    attentions, paths = set(), set()
    for layer in plan.layers:
        for suffix in layer.outputs:
            scale = kv_scale(f"{layer.name}.{suffix}")
            if scale is not None and suffix in layer.inputs:
                attentions.add(scale.attentions[0])
                paths.add(layer.inputs[suffix].path.parent)
    return len(attentions), [n for n, source in plan.sources.items() if source.path in paths]
