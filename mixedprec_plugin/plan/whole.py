"""Whether a model is whole: what config.json, its siblings and its module say that there must be.

    config.json     as many blocks and experts as it says; a head unless it is tied, biases and
                    shared experts where it asks for them
    its siblings    blocks of one kind hold the same layers, and so do experts
    its module      layers that go together, `Family.parts`: no k_proj without a v_proj

Of a family that is not known, only what sets one block apart from all others is told: its blocks
may be of kinds that config.json does not name, and its modules made of other parts.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.config import (
    Config,
    block_kind,
    count_of,
    is_language_model,
    text_config,
)
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.families.table import family_of, is_in_table
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import PlannedLayer

# scales beside a weight are a matter of its format, or of the KV cache's
_SCALES = re.compile(r"scales?$|zero_points?$|_scale_")
# beside a matrix of another name: `gate.e_score_correction_bias`, `experts.gate_up_proj_bias`
_BIASES = re.compile(r"(?:correction|expert|router|proj)_bias$")
_EXPERTS = re.compile(r"(?:^|\.)experts(?=\.\d+\.)")
_NUMBERED = re.compile(r"\.(\d{1,9})\.")
_BESIDE = re.compile(r"visi|visual|image|audio|vit\b|mtp")
_WEIGHT = frozenset({"weight"})
# what the first and the last layers of models are called, that of the others is not
_EMBEDDING = re.compile(r"(?!.*(?:pos|norm|patch|rot))(?:.*emb|wte|shared$)", re.IGNORECASE)
_NORM = re.compile(r"(?:norm|norm_f|ln_f|ln_out)$", re.IGNORECASE)
_HEAD = re.compile(r"(?:head|output\w*|proj_out|predictions)$")
# before attention: where there is none, the last block may end in its own (OPT, BART)
_FIRST_NORM = re.compile(r"(?<!layer_)norm1?$|ln_1$")
_REMEDY = "download the checkpoint again, or take one that is whole"
Missing = Iterator[tuple[str, str]]


def check_whole(
    layers: Sequence[PlannedLayer], tied: Mapping[str, str], config: Config
) -> list[Problem]:
    """Find what a model lacks.

    Args:
        layers: of the whole model, from whatever source.
        tied: tied layer name -> the layer whose weight it shares.
    Returns:
        an error for each kind of layer; none of what is no whole language model by config.json.
    """
    if not is_language_model(config):
        return []
    model = _Model(layers, config)
    missing = dict([*_ends(model, tied), *_said(model), *_unlike_siblings(model)])
    for name, why in _without_companions(model):
        # of a part that may have several names, its siblings have told the right one
        parent = name.rpartition(".")[0]
        if not any(other.rpartition(".")[0] == parent for other in missing):
            missing[name] = why
    return fold_problems(
        Problem(name, f"the checkpoint lacks it: {why}{model.hint(name)}", _REMEDY, "whole-model")
        for name, why in missing.items()
    )


class _Model:
    """The layers of a model by the modules and blocks that they lie in.

    Attributes:
        children: module -> the layers, single parameters and modules in it.
        stacks: `model.layers` -> number of a block -> names in it.
        outside: names in modules that are in no stack, and no tower.
        decoder: the stack of the language model.
    """

    def __init__(self, layers: Iterable[PlannedLayer], config: Config) -> None:
        self.config, self.family = config, family_of(config)
        self.is_known = self.family.is_known
        self.is_all_known = self.is_known and is_in_table(config)
        self.said = text_config(config)
        self.children: dict[str, set[str]] = {"": set()}
        self.stacks: dict[str, dict[int, set[str]]] = {}
        self.floats = {x.name for x in layers if x.stored is None or x.stored.is_float}
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
        held = [x for x in self.children.get(module, ()) if _is_a_letter_off(x, child)]
        held = [x for x in held if x not in known]
        return f" (it holds {held[0]})" if held else ""


def _parts_of(name: str, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (module, name in it) of a layer's matrix, its bias and its single parameters.

    Args:
        kinds: as `_kinds_of_parts` gives them.
    """
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
        if suffix == "bias" and is_float:  # tools that quantize write zeros
            yield ".bias"
        elif _BIASES.search(suffix):
            yield f".{suffix}"
        elif is_float and suffix != "bias" and not _is_no_matrix(suffix):
            yield f"/{suffix}"


def _is_no_matrix(suffix: str) -> bool:
    """Whether it is a scale without its weight, or one of a wrong name."""
    return _SCALES.search(suffix) is not None or _is_a_letter_off(suffix, "weight")


def _is_a_letter_off(name: str, other: str) -> bool:
    return len(name) == len(other) and sum(a != b for a, b in zip(name, other, strict=True)) == 1


def _ends(model: _Model, tied: Mapping[str, str]) -> Missing:
    """Yield what is missing before and behind the blocks of a decoder.

    Of a family that is not known, names that may be theirs count wherever no block is.
    """
    if not model.decoder:
        return
    root = model.root
    held = model.children[root] if model.is_known else model.outside
    blocks = model.stacks[model.decoder].values()
    has_norms = model.said.get("do_layer_norm_before") or any(
        _FIRST_NORM.search(name) for names in blocks for name in names
    )
    is_embedded = held & (model.family.embeddings - {"wpe", "position_embedding"})
    if not is_embedded and (model.is_known or not any(map(_EMBEDDING.match, held))):
        yield f"{root}.embed_tokens", "every model has one"
    if has_norms and not any(map(_NORM.search, held)):
        yield f"{root}.norm", "there is one behind the last block"
    has_biases = any("input_layernorm.bias" in names for names in blocks)
    if model.is_known and has_biases and not any(name.endswith("norm.bias") for name in held):
        yield f"{root}.norm.bias", "other norms have one"
    said = {section.get("tie_word_embeddings") for section in (model.config, model.said)} - {None}
    if not tied and said == {False}:
        around = [module for module in model.children if f"{root}.".startswith(module)]
        held = held.union(*map(model.children.__getitem__, around))
        is_headed = held & model.family.lm_heads
        if not is_headed and (model.is_known or not any(map(_HEAD.search, held))):
            yield "lm_head", "tie_word_embeddings is false in config.json"


def _said(model: _Model) -> Missing:
    """Yield what config.json says that there is."""
    blocks = count_of(model.said, "num_hidden_layers")
    yield from _numbered(model, model.decoder, blocks, "num_hidden_layers is {}")
    vision = model.config.get("vision_config")
    if isinstance(vision, Mapping) and model.is_all_known:
        depth = count_of(vision, "depth", "num_hidden_layers")
        yield from _numbered(model, model.tower, depth, "vision_config has {} blocks")
    experts = count_of(model.said, "num_experts", "num_local_experts", "n_routed_experts")
    for stack in model.stacks:
        if stack.endswith(".experts") and stack.startswith(f"{model.decoder}."):
            yield from _numbered(model, stack, experts, "the number of experts is {}")
    if not model.is_known:
        return
    has_bias = bool(model.said.get("attention_bias"))
    is_biased = model.family.has_biased_router or model.said.get("topk_method") == "noaux_tc"
    has_shared = bool(count_of(model.said, "n_shared_experts"))
    for module, held in model.children.items():
        if not module.startswith(f"{model.decoder}."):
            continue
        if has_bias and "k_proj" in held:
            for name in ("q_proj", "k_proj", "v_proj"):
                if f"{name}.bias" not in held and f"{module}.{name}" in model.floats:
                    yield f"{module}.{name}.bias", "attention_bias is true in config.json"
        if is_biased and "gate" in held and "gate.e_score_correction_bias" not in held:
            yield f"{module}.gate.e_score_correction_bias", "its router chooses experts by one"
        if has_shared and "experts" in held and "shared_experts" not in held:
            yield f"{module}.shared_experts", "config.json says n_shared_experts"


def _numbered(model: _Model, stack: str, count: int, why: str) -> Missing:
    """Yield the members of a stack that are not there, of as many as config.json says."""
    before = -1
    for number in [*sorted(n for n in model.stacks.get(stack, ()) if n < count), count]:
        if stack in model.stacks and number > before + 1:
            run = str(before + 1) if number == before + 2 else f"{before + 1}-{number - 1}"
            yield f"{stack}.{run}", f"{why.format(count)} in config.json"
        before = number


def _unlike_siblings(model: _Model) -> Missing:
    """Yield what most blocks of a kind hold and one does not."""
    for stack, blocks in model.stacks.items():
        kinds: dict[object, list[int]] = {}
        for number in blocks:
            kind = block_kind(model.config, number) if stack == model.decoder else None
            kinds.setdefault(kind, []).append(number)
        for numbers in kinds.values():
            yield from _unlike(model, stack, numbers)


def _unlike(model: _Model, stack: str, numbers: Sequence[int]) -> Missing:
    blocks = [frozenset(model.stacks[stack][number]) for number in numbers]
    alike = Counter(blocks)
    if len(alike) < 2:
        return
    is_known, is_all_known = stack == model.decoder and model.is_known, model.knows(stack)
    held = Counter(name for block in blocks for name in block)
    is_one_apart = max(alike.values()) == len(blocks) - 1
    if not is_one_apart and not is_known and stack != model.decoder and not is_all_known:
        return
    # of two, either may be the one that lacks something
    usual = {name for name, n in held.items() if 2 * n > len(blocks) or len(blocks) == 2}
    told: list[str] = []
    for number, block in zip(numbers, blocks, strict=True):
        lacking = usual - block
        is_another = alike[block] > 1 or 2 * len(lacking) > len(usual)
        if not is_known and (is_another or (len(blocks) == 2 and not is_all_known)):
            continue  # of another kind, for all that is known
        for name in sorted(lacking, key=lambda name: -model.count(name)):
            # where a letter is flipped in one of two, the rarer name is the wrong one
            if not any(_is_a_letter_off(name, other) for other in told):
                told.append(name)
                yield f"{stack}.{number}.{name}", f"other blocks of {stack} have one"


def _without_companions(model: _Model) -> Missing:
    """Yield what a module lacks, by the rest that it has."""
    groups = [[word.lstrip("&").split("|") for word in part.split()] for part in model.family.parts]
    asks = [
        frozenset(name for word in part.split() if word[0] != "&" for name in word.split("|"))
        for part in model.family.parts
    ]

    @functools.cache
    def lacking_of(held: frozenset[str]) -> list[tuple[int, list[list[str]]]]:
        """The groups that a module has a member of -> the members that it lacks."""
        return [
            (index, [names for names in group if held.isdisjoint(names)])
            for index, group in enumerate(groups)
            if not held.isdisjoint(asks[index])
        ]

    found: dict[tuple[str, int], dict[str, list[list[str]]]] = {}
    for module, children in model.children.items():
        for name in children:
            layer = name.removesuffix(".bias")
            # a head may be tied and have a bias
            if layer != name and layer not in children and not _HEAD.search(layer):
                yield f"{module}.{layer}", "it has a bias"
        for index, lacking in lacking_of(model.names_in(module)):
            found.setdefault((without_numbers(module), index), {})[module] = lacking
    for modules in found.values():
        lacking_modules = {module: names for module, names in modules.items() if names}
        is_one_alone = len(lacking_modules) == 1 < len(modules)
        for module, lacking in lacking_modules.items():
            # where that is not known, modules may be made of other parts; but not one alone
            if not is_one_alone and not model.knows(module):
                continue
            for names in lacking:
                kind = last_component(module)
                first, *others = sorted(names, key=lambda name: -model.spelled[kind, name])
                named = f", or {' or '.join(others)}" if others else ""
                yield f"{module}.{first}".strip("."), f"it goes with what is beside it{named}"
