"""Which layers read a norm's output, and which layer's outputs another reads, told by names.

Tools that smooth weights (AWQ, SmoothQuant) multiply a layer's columns, and divide what is before.

    norm                                      its consumers
    input_layernorm                           q, k, v (q_a, kv_a), and where there is no other norm
                                              before it, the MLP (parallel blocks: Cohere, Falcon)
    post_attention_layernorm                  gate, up, router, experts, shared experts
    pre_feedforward_layernorm (Gemma)         the same; post_attention_layernorm is then no input
    post_*layernorm of OLMo 2, Exaone 4       none: they come after o_proj and down_proj
    q_a_layernorm, kv_a_layernorm (DeepSeek)  q_b_proj, kv_b_proj
    the last norm                             lm_head, or the embedding that it is tied to

    producer   its consumer
    v_proj     o_proj
    up_proj    down_proj, for each expert, too

Families that are not in the table, and norms of other names, are not guessed at: all layers beside
such a norm (below its parent) count as its consumers, and none of them may be rescaled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mixedprec_plugin.families.config import Config
from mixedprec_plugin.families.names import Kind, last_component
from mixedprec_plugin.families.record import Family
from mixedprec_plugin.families.table import family_of

_BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")


class Unit(NamedTuple):
    """A norm and the layers that are right only behind it.

    Attributes:
        norm: layer name; of what is no norm (a router's bias, a short convolution), too.
        consumers: names of the layers that read its output.
        fixed: layers that may be consumers, so that they must come with it and are never rescaled.
    """

    norm: str
    consumers: tuple[str, ...]
    fixed: tuple[str, ...] = ()


def coupled_units(kinds: Mapping[str, Kind], tied: Mapping[str, str], config: Config) -> list[Unit]:
    """List every norm with its consumers.

    Args:
        kinds: layer name -> kind, of the whole model.
        tied: tied layer name -> the layer whose weight it shares.
    """
    family = family_of(config)
    blocks: dict[str, tuple[list[str], list[str]]] = {}
    for name, kind in kinds.items():
        match = _BLOCK.match(name)
        norms, matrices = blocks.setdefault(match[1] if match else "", ([], []))
        (norms if kind == "norm" else matrices).append(name)
    norms, matrices = blocks.pop("", ([], []))
    units = [
        _known_unit(block, norm, *layers, family) or _unknown_unit(norm, layers[1])
        for block, layers in blocks.items()
        for norm in layers[0]
    ]
    # one that is quantized is of the kind of linear layers
    heads = tuple(name for name in matrices if last_component(name) in family.lm_heads)
    is_last = len(norms) == 1 and last_component(norms[0]).endswith("norm")
    if is_last and heads and family.norm_offset is not None:
        return [*units, Unit(norms[0], heads)]
    return units + [Unit(norm, (), heads or tuple(tied.values())) for norm in norms]


def producers(names: Collection[str], config: Config) -> list[tuple[str, str]]:
    """List (producer, consumer) of layers whose outputs another layer of the same module reads."""
    family = family_of(config)
    found = []
    for name in names:
        parent, _, last = name.rpartition(".")
        for candidate in family.producers.get(last, ()):
            if (producer := f"{parent}.{candidate}") in names:
                found.append((producer, name))
                break
    return found


def _unknown_unit(norm: str, matrices: Sequence[str]) -> Unit:
    """A norm that any layer beside it may read."""
    # parameters that stand at a module itself (`self_attn.sinks`) go with what is below it
    inside = tuple(name for name in matrices if name.startswith(f"{norm}."))
    parent = norm.rpartition(".")[0]
    return Unit(norm, (), inside or tuple(n for n in matrices if n.startswith(f"{parent}.")))


def _known_unit(
    block: str, norm: str, norms: Sequence[str], matrices: Sequence[str], family: Family
) -> Unit | None:
    """The consumers of a norm; None where its name does not tell."""
    if family.norm_offset is None:
        return None
    parent, _, last = norm.rpartition(".")
    both = family.attention | family.mlp
    first, behind = f"{block}.input_layernorm", f"{block}.post_attention_layernorm"
    if (gemmas := f"{block}.pre_feedforward_layernorm") in norms:
        behind = gemmas
    if norm == first:
        modules = family.attention if behind in norms else both
    elif norm == behind and first in norms:
        modules = family.mlp
    elif last in family.latent_norms:
        reader = f"{parent}.{family.latent_norms[last]}"
        return Unit(norm, tuple(name for name in matrices if name == reader))
    else:
        return None
    others = (*family.outputs, *family.latent_norms.values())
    consumers, fixed = [], []
    for name in matrices:
        child = name.removeprefix(f"{block}.")
        top, last = child.partition(".")[0], last_component(child)
        inputs = family.attention_inputs if top in family.attention else family.mlp_inputs
        if top in modules and last in inputs:
            consumers.append(name)
        elif (top in modules or top not in both) and last not in others:
            fixed.append(name)
    return Unit(norm, tuple(consumers), tuple(fixed))
