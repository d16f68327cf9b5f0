"""A model's layers by the modules and the blocks that they lie in, as their names say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mixedprec_plugin.families.config import Config, count_of, text_config
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.families.table import family_of, is_in_table
from mixedprec_plugin.plan.model import PlannedLayer

# scales beside a weight are a matter of its format, or of the KV cache's
_SCALES = re.compile(r"scales?$|zero_points?$|_scale_")
# beside a matrix of another name: `gate.e_score_correction_bias`, `experts.gate_up_proj_bias`
_BIASES = re.compile(r"(?:correction|expert|router|proj)_bias$")
_EXPERTS = re.compile(r"(?:^|\.)experts(?=\.\d+\.)")
_NUMBERED = re.compile(r"\.(\d{1,9})\.")
_BESIDE = re.compile(r"visi|visual|image|audio|vit\b|mtp")
_WEIGHT = frozenset({"weight"})


class Tree:
    """The layers of a model by the modules and blocks that they lie in.

    Attributes:
        children: module -> the layers, single parameters and modules in it.
        stacks: `model.layers` -> number of a block -> names in it.
        outside: names in modules that are in no stack, and no tower.
        decoder: the stack of the language model.
        biases: of layers in codes, which are in no module: tools that quantize write zeros.
    """

    def __init__(self, layers: Sequence[PlannedLayer], config: Config) -> None:
        self.config, self.family = config, family_of(config)
        self.is_known = self.family.is_known
        self.is_all_known = self.is_known and is_in_table(config)
        self.said = text_config(config)
        self.children: dict[str, set[str]] = {"": set()}
        self.stacks: dict[str, dict[int, set[str]]] = {}
        self.floats = {x.name for x in layers if x.stored is None or x.stored.is_float}
        coded = (x for x in layers if x.name not in self.floats)
        self.biases = {f"{x.name}.bias" for x in coded if "bias" in x.inputs}
        places: dict[str, list[tuple[set[str], str]]] = {}
        kinds: dict[object, list[str]] = {}
        for layer in layers:
            kind = id(layer.stored), *layer.inputs
            if kind not in kinds:
                kinds[kind] = list(_kinds_of_parts(layer))
            for module, child in _parts_of(layer.name, kinds[kind]):
                if module not in places:
                    places[module] = self._places(module)
                for held, before in places[module]:
                    held.add(before + child)
        outermost = [s for s in self.stacks if not _NUMBERED.search(f"{s}.")]
        own = [stack for stack in outermost if not _BESIDE.search(stack)]
        count = count_of(self.said, "num_hidden_layers")
        self.decoder = max(
            own, key=lambda x: (len(self.stacks[x]) == count, self._size(x)), default=""
        )
        self.root = self.decoder.rpartition(".")[0]
        towers = [stack for stack in outermost if "vis" in stack]
        self.tower = max(towers, key=self._size, default="")
        modules = [module for module in self.children if not _NUMBERED.search(f"{module}.")]
        free = [self.children[module] for module in modules if not _BESIDE.search(module)]
        self.outside = set[str]().union(*free)
        self.spelled = Counter(
            (last_component(module), name)
            for module, held in self.children.items()
            for name in held
        )

    def knows(self, module: str) -> bool:
        """Whether it is known what a module is made of: of the towers of some models it is not."""
        return self.is_all_known or (self.is_known and f"{module}.".startswith(f"{self.root}."))

    def _size(self, stack: str) -> int:
        return sum(map(len, self.stacks[stack].values()))

    def _places(self, module: str) -> list[tuple[set[str], str]]:
        """Where the names in a module count, and what stands before them there."""
        places = [(self.children.setdefault(module, set()), "")]
        outer = module
        is_new = True
        while outer and is_new:
            outer, _, child = outer.rpartition(".")
            is_new = outer not in self.children
            self.children.setdefault(outer, set()).add(child)
        for match in _NUMBERED.finditer(text := f"{module}."):
            blocks = self.stacks.setdefault(text[: match.start()], {})
            block, inside = blocks.setdefault(int(match[1]), set()), text[match.end() :]
            # experts are compared with each other
            if experts := _EXPERTS.search(inside):
                block.add(inside[: experts.end()])
            else:
                places.append((block, inside))
        return places

    def count(self, name: str) -> int:
        """How often modules of its module's name hold one of a name."""
        module, _, child = name.rpartition(".")
        return self.spelled[last_component(module), child]

    def names_in(self, module: str) -> frozenset[str]:
        """What is in a module, and in the modules in it, `merger.norm`."""
        held = self.children[module]
        before = f"{module}." if module else ""
        inner = [(x, self.children[name]) for x in held if (name := before + x) in self.children]
        return frozenset(held).union(
            f"{child}.{x}" for child, names in inner if not child.isdecimal() for x in names
        )

    def hint(self, name: str) -> str:
        """What it holds in its place, by a name that is a letter off."""
        module, _, child = name.rpartition(".")
        known = set(re.split(r"[ &|]+", " ".join(self.family.parts)))
        held = sorted(self.children.get(module, set()) - known)
        return next((f" (it holds {x})" for x in held if is_a_letter_off(x, child)), "")


def _parts_of(name: str, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (module, name in it) of each part of a layer, of the kinds of `_kinds_of_parts`."""
    module, _, last = name.rpartition(".")
    if last.isdecimal():  # of a list of layers
        module, _, before = module.rpartition(".")
        last = f"{before}.{last}"
    for kind in kinds:
        yield (name, kind[1:]) if kind.startswith("/") else (module, last + kind)


def _kinds_of_parts(layer: PlannedLayer) -> Iterator[str]:
    """What stands behind the name of a layer in its module, for each of its parts.

    The same for layers of one format with tensors of the same names. A `/` stands before a
    parameter of its own, for which the layer is a module.
    """
    stored = layer.stored
    is_float = stored is None or stored.is_float or not stored.suffixes
    matrix = (stored.suffixes if stored else _WEIGHT) & layer.inputs.keys()
    if "weight" in matrix or not all(map(_is_no_matrix, matrix)):
        yield ""
    for suffix in layer.inputs.keys() - matrix:
        if suffix == "bias" and is_float:
            yield ".bias"
        elif _BIASES.search(suffix):
            yield f".{suffix}"
        elif is_float and suffix != "bias" and not _is_no_matrix(suffix):
            yield f"/{suffix}"


def _is_no_matrix(suffix: str) -> bool:
    """Whether it is a scale without its weight, or one of a wrong name."""
    return _SCALES.search(suffix) is not None or is_a_letter_off(suffix, "weight")


def is_a_letter_off(name: str, other: str) -> bool:
    return len(name) == len(other) and sum(a != b for a, b in zip(name, other, strict=True)) == 1
