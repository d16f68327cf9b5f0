"""Where scales can be folded: layers that read the same states, and what makes these.

    norm -> q, k, v     norm -> gate, up     v -> o     up -> down

The readers' columns are multiplied by factors, and what is before them is divided by these: a norm,
or the rows and the bias of a layer. All of a unit is rounded by calibration, but the norm. Experts
are left alone: their router reads the same norm, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.config import sizes
from mixedprec_plugin.families.names import KV_SUFFIXES, last_component, parent_of
from mixedprec_plugin.families.record import Family
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.families.wiring import Unit as Coupled
from mixedprec_plugin.families.wiring import coupled_units, producers
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import Plan, PlannedLayer


class Unit(NamedTuple):
    """What factors are folded within.

    Attributes:
        maker: the norm, or the layer whose outputs are read.
        readers: the layers whose columns are multiplied.
        num_heads: of keys and values, where the maker makes values; several query heads in a row
            read one of them. 1 for others.
    """

    maker: PlannedLayer
    readers: tuple[PlannedLayer, ...]
    num_heads: int = 1


class Folds(NamedTuple):
    """What of a plan can be folded.

    Attributes:
        groups: units that share layers, a layer's rows scaled before its columns.
        left: why other units are left as they are, folded by layer range.
        offset: what norms add to their weight.
    """

    groups: Sequence[Sequence[Unit]]
    left: Sequence[Problem]
    offset: float

    @property
    def num_units(self) -> int:
        return sum(map(len, self.groups))


NO_FOLDS = Folds([], [], 0.0)


def find_folds(plan: Plan, names: Set[str]) -> Folds:
    """Find the units of a plan that can be folded; `names` are what calibration rounds."""
    config = plan.source.config
    family = family_of(config)
    if family.norm_offset is None:
        why = "nothing is known of what reads the norms of this model"
        return Folds([], [Problem("the model", why)], 0.0)
    num_heads = int(sizes(config).get("num_key_value_heads", 1))
    units: list[Unit] = []
    left: list[Problem] = []
    # first: they scale rows of what reads a norm
    for maker, reader in producers(plan.by_name, config):
        if reader in names:
            one = Unit(plan.by_name[maker], (plan.by_name[reader],))
            if last_component(maker) == "v_proj":
                one = one._replace(num_heads=num_heads)
            why = _why_no_pair(one, plan, names)
            left.append(Problem(reader, why)) if why else units.append(one)
    kinds = {layer.name: layer.kind for layer in plan.layers}
    for coupled in coupled_units(kinds, plan.tied, config):
        if names & set(coupled.consumers):
            why = _why_no_norm(coupled, plan, family, names)
            readers = tuple(plan.by_name[name] for name in coupled.consumers)
            one = Unit(plan.by_name[coupled.norm], readers)
            left.append(Problem(coupled.norm, why)) if why else units.append(one)
    return Folds(_grouped(units), fold_problems(left), family.norm_offset)


def layers_of(group: Sequence[Unit]) -> list[PlannedLayer]:
    """The layers of a group that are rounded, each once."""
    every = (layer for unit in group for layer in (unit.maker, *unit.readers))
    return list({layer.name: layer for layer in every if layer.kind != "norm"}.values())


def _grouped(units: Sequence[Unit]) -> list[list[Unit]]:
    groups: list[list[Unit]] = []
    of_layer: dict[str, list[Unit]] = {}
    for unit in units:
        names = [layer.name for layer in layers_of([unit])]
        joined = {id(of_layer[name]): of_layer[name] for name in names if name in of_layer}
        group = [*(one for other in joined.values() for one in other), unit]
        groups = [other for other in groups if id(other) not in joined] + [group]
        of_layer |= {layer.name: group for layer in layers_of(group)}
    return groups


def _why_no_pair(unit: Unit, plan: Plan, names: Set[str]) -> str:
    """Why a layer's rows cannot be scaled for the one that reads its outputs; empty if they can."""
    maker, (reader,) = unit.maker, unit.readers
    made, parent = last_component(maker.name), parent_of(reader.name)
    if reader.kind == "expert":
        return "experts are left as they are"
    # an MLP without a gate has its activation between the two
    if made != "v_proj" and not (made == "up_proj" and f"{parent}.gate_proj" in plan.by_name):
        return f"its inputs are not linear in what {made} alone makes"
    if maker.name not in names:
        return f"{made} is not calibrated"
    assert maker.stored is not None
    assert reader.stored is not None
    if made == "v_proj" and any(
        layer.outputs.keys() & KV_SUFFIXES and f"{layer.name}.".startswith(f"{parent}.")
        for layer in plan.layers
    ):
        return "the KV cache has scales for what v_proj makes"
    if reader.stored.K % maker.stored.N or maker.stored.N % unit.num_heads:
        return f"it has {reader.stored.K} inputs, and {made} {maker.stored.N} outputs"
    return ""


def _why_no_norm(coupled: Coupled, plan: Plan, family: Family, names: Set[str]) -> str:
    """Why a norm cannot be divided for what reads it; empty if it can."""
    readers = [plan.by_name[name] for name in coupled.consumers]
    if any(layer.kind in ("expert", "router") for layer in readers):
        return "a router and experts read it"
    # attention itself, where it holds scales of the KV cache, reads no norm
    fixed = [name for name in coupled.fixed if not plan.by_name[name].outputs.keys() <= KV_SUFFIXES]
    if fixed:
        return f"it is not known whether {last_component(fixed[0])} reads it"
    if last_component(coupled.norm) in family.latent_norms:
        return "the KV cache holds what it makes"
    if other := [layer for layer in readers if layer.name not in names]:
        return f"{last_component(other[0].name)} reads it and is not calibrated"
    weight = plan.by_name[coupled.norm].outputs
    if set(weight) != {"weight"}:
        return f"it holds {', '.join(sorted(weight))} (expected a weight alone)"
    shapes = {(layer.stored.K,) for layer in readers if layer.stored is not None}
    if shapes != {weight["weight"].shape}:
        return "its readers have more inputs than it makes"
    return ""
