"""The names that SGLang gives to modules -> the names that the checkpoint spells."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from mixedprec_plugin.errors import LoadError, Problem
from mixedprec_plugin.families.names import sglang_name
from mixedprec_plugin.families.record import Family

if TYPE_CHECKING:
    from sglang.srt.models.utils import WeightsMapper


class ModuleNames:
    """Finds the planned module that a module of SGLang's is.

    Models name their modules as the checkpoint does, as their family's record says, by a mapper of
    their own, or without the checkpoint's outermost components.

    Args:
        modules: module names of the plan, as the checkpoint spells them.
    """

    def __init__(self, modules: Collection[str], family: Family) -> None:
        self._modules = {sglang_name(module, family): module for module in modules}
        self._modules |= dict(zip(modules, modules, strict=True))
        self._by_tail: dict[str, set[str]] = {}

    def apply(self, mapper: WeightsMapper) -> None:
        """Take a model's own mapper of names into account."""
        for module in list(self._modules.values()):
            # a name that the model has no use for is left out
            self._modules |= dict.fromkeys(mapper.apply_list([module]), module)
        self._by_tail.clear()

    def find(self, prefix: str) -> str | None:
        """The planned module that SGLang calls `prefix`; None if there is none.

        Raises:
            LoadError: several planned modules could be meant.
        """
        if prefix in self._modules:
            return self._modules[prefix]
        if not self._by_tail:
            self._index_tails()
        candidates = sorted(self._by_tail.get(prefix, ()))
        if len(candidates) > 1:
            what = (
                f"the model builds it, and it could be {' or '.join(candidates)} of the checkpoint"
            )
            remedy = "please report it with the model's config.json"
            raise LoadError(Problem(prefix, what, remedy, "ambiguous-module"))
        return candidates[0] if candidates else None

    def _index_tails(self) -> None:
        for spelled, module in self._modules.items():
            _, dot, tail = spelled.partition(".")
            while dot:
                self._by_tail.setdefault(tail, set()).add(module)
                _, dot, tail = tail.partition(".")
