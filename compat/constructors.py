"""What the registry's builders make, against the constructors of SGLang's config classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from compat.definitions import Definition, Missing, find
from compat.signatures import call_signature, misfit
from compat.sources import Sources
from mixedprec_plugin.cli.doctor import variants
from mixedprec_plugin.methods.registry import METHODS, bind


@dataclasses.dataclass(frozen=True)
class Construction:
    """One config that the registry would construct.

    Attributes:
        where: file and line of ours that makes the arguments.
        method: canonical name.
        label: method and arguments as people write them.
        platform: key of the method's `config_classes`.
        config_class: dotted.
        keywords: what the builder makes.
    """

    where: str
    method: str
    label: str
    platform: str
    config_class: str
    keywords: dict[str, Any]


def constructions(ours: Sources) -> Iterator[Construction]:
    """Every config class of the registry with what its builder makes of defaults and variants."""
    for name, given in variants():
        method, arguments = bind(name, given)
        spec = METHODS[method]
        label = " ".join([name, *(f"{key}={value}" for key, value in given.items())])
        for platform, lazy in spec.config_classes.items():
            keywords = spec.config_arguments(arguments, platform)
            builder = spec.config_arguments
            where = f"{ours.path(builder.__module__)}:{builder.__code__.co_firstlineno}"
            dotted = lazy.replace(":", ".")
            yield Construction(where, method, label, platform, dotted, keywords)


def construction_fault(construction: Construction, sources: Sources) -> str:
    """Why a config could not be constructed, as far as the signature tells; empty if it could."""
    found = find(sources, construction.config_class)
    if isinstance(found, Missing):
        return f"no {found.name} in {found.within}"
    return _misfit(construction, sources, found)


def fault_elsewhere(construction: Construction, sources: Sources, place: str) -> str:
    """The same, if the class were taken from another place."""
    found = find(sources, place)
    assert isinstance(found, Definition)
    return _misfit(construction, sources, found) or "the arguments fit there"


def _misfit(construction: Construction, sources: Sources, found: Definition) -> str:
    wanted = call_signature(sources, found)
    if wanted is None:
        return "its constructor cannot be read"
    return misfit(wanted, 0, construction.keywords)
