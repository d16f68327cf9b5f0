"""`lm_head`: untied where the preset asks for it, and quantized where a rule spells its name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.families.names import Kind, last_component
from mixedprec_plugin.methods.registry import AUTO, METHODS, UNQUANTIZED
from mixedprec_plugin.methods.stored import StoredFormat
from mixedprec_plugin.plan.matching import Matches
from mixedprec_plugin.preset.model import Rule

HEAD = "lm_head"
_TIES = "tie_word_embeddings"
# DEFAULT_VOCAB_PADDING_SIZE of layers/vocab_parallel_embedding.py
_PADDING = 64


def tied_layers(source: Source, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Tied layer name -> the layer whose weight it shares."""
    if not source.config.get(_TIES) or "lm_head" in kinds.values():
        return {}
    embedding = next((name for name, kind in kinds.items() if kind == "embedding"), "")
    return {HEAD: embedding} if embedding else {}


def untied(source: Source, tied: Mapping[str, str]) -> Source:
    """A checkpoint as if its head were stored, and config.json said so; no byte of it is copied."""
    tensors = dict(source.tensors)
    for head, embedding in tied.items():
        if head in source.layers or embedding not in source.layers:
            continue
        for suffix, tensor in source.layers[embedding].items():
            name = f"{head}.{suffix}"
            tensors[name] = tensor._replace(name=name, part_of=tensor)
    config = MappingProxyType({**source.config, _TIES: False})
    return dataclasses.replace(source, config=config, tensors=MappingProxyType(tensors))


def with_heads(reference: Source, kinds: Mapping[str, Kind]) -> Source:
    """A checkpoint that a plan, layer name -> kind, is compared with, untied as its layers are."""
    embedding = next((name for name, kind in kinds.items() if kind == "embedding"), "")
    is_apart = HEAD in kinds and bool(reference.config.get(_TIES))
    return untied(reference, {HEAD: embedding}) if is_apart else reference


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
