"""`lm_head`: untied where the preset asks for it, and quantized where a rule spells its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.families.config import TIES_HEAD, ties_head
from mixedprec_plugin.families.names import Kind, last_component
from mixedprec_plugin.families.record import POSITIONS
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.preset.model import Rule

HEAD = "lm_head"
DIFFERENT_MODELS = "config.json and weights are of different models"
# DEFAULT_VOCAB_PADDING_SIZE of layers/vocab_parallel_embedding.py
_PADDING = 64


def tied_layers(source: Source, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Tied layer name -> the layer whose weight it shares, also where a copy of it is stored."""
    heads = {name for name, kind in kinds.items() if kind == "lm_head"}
    if not ties_head(source.config) or heads - {HEAD}:
        return {}
    embedding = _embedding(kinds)
    return {HEAD: embedding} if embedding else {}


def _embedding(kinds: Mapping[str, Kind]) -> str:
    """The embedding of tokens; empty if there is none."""
    embeddings = (name for name, kind in kinds.items() if kind == "embedding")
    return next((name for name in embeddings if last_component(name) not in POSITIONS), "")


def unbuilt_remedy(plan: Plan, name: str) -> str:
    """What to do about a layer or tensor that SGLang's class has no module for."""
    if plan.preset.untie_lm_head and name.startswith(HEAD):
        return (
            f"take untie_lm_head and the rule for {HEAD} out of the preset: that class uses the "
            "embedding as its head"
        )
    return DIFFERENT_MODELS


def untied(source: Source, tied: Mapping[str, str]) -> Source:
    """A checkpoint as if its head were stored, and config.json said so; no byte of it is copied."""
    tensors = dict(source.tensors)
    for head, embedding in tied.items():
        is_own = head in source.layers and not ties_head(source.config)
        if is_own or embedding not in source.layers:
            continue
        for suffix in source.layers.get(head, ()):
            del tensors[f"{head}.{suffix}"]
        for suffix, tensor in source.layers[embedding].items():
            name = f"{head}.{suffix}"
            tensors[name] = tensor._replace(name=name, part_of=tensor)
    config = MappingProxyType({**source.config, TIES_HEAD: False})
    return dataclasses.replace(source, config=config, tensors=MappingProxyType(tensors))


def with_heads(reference: Source, kinds: Mapping[str, Kind]) -> Source:
    """A checkpoint that a plan, layer name -> kind, is compared with, untied as its layers are."""
    is_apart = HEAD in kinds and ties_head(reference.config)
    return untied(reference, {HEAD: _embedding(kinds)}) if is_apart else reference


def decided_by_name(matches: Matches, rules: Collection[Rule], heads: Collection[str]) -> Matches:
    """The same, where only rules that spell a head's name may quantize it."""
    deciding = dict(matches.deciding)
    for head in heads:
        deciding.pop(head, None)
        word = re.compile(rf"(?<!\w){re.escape(last_component(head))}(?!\w)")
        for rule in rules:
            is_named = rule.scheme.method in (UNQUANTIZED, AUTO) or any(
                map(word.search, rule.patterns)
            )
            if is_named and head in matches.matched[rule.index]:
                deciding[head] = rule
    return dataclasses.replace(matches, deciding=deciding)


def is_served_quantized(rule: Rule | None, stored: StoredFormat | None) -> bool:
    """Whether a head runs in a method's class: a rule asks for it, or it is stored so."""
    if stored is None or (rule is not None and rule.scheme.method == UNQUANTIZED):
        return False
    if rule is None:
        return bool(stored.method) and METHODS[stored.method].serves_heads
    return not stored.is_float or rule.scheme.method != AUTO


def padded(vocabulary: int, tp_size: int) -> int:
    """Rows of a head as SGLang builds it over its ranks.

    Source: `VocabParallelEmbedding.__init__` (layers/vocab_parallel_embedding.py:275).
    """
    rows = -(-vocabulary // _PADDING) * _PADDING
    return rows if rows % tp_size == 0 else -(-rows // (_PADDING * tp_size)) * _PADDING * tp_size
