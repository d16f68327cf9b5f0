"""Whether a model is whole: what config.json, its siblings and its module say that there must be.

config.json tells blocks and experts, a head unless it is tied, biases and shared experts; blocks of
one kind, and experts, hold the same layers; in a module some go together, `Family.parts`. Of a
family that is not known, only what sets one block apart from all others is told.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.config import (
    TIES_HEAD,
    Config,
    block_kind,
    count_of,
    is_language_model,
    ties_head,
)
from mixedprec_plugin.families.names import last_component
from mixedprec_plugin.families.record import POSITIONS
from mixedprec_plugin.names import without_numbers
from mixedprec_plugin.plan.folding import fold_problems
from mixedprec_plugin.plan.model import PlannedLayer
from mixedprec_plugin.plan.tree import Tree, is_a_letter_off

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
    """Find what a model lacks: an error for each kind of layer.

    None of what is no whole language model by config.json.
    """
    if not is_language_model(config):
        return []
    tree = Tree(layers, config)
    missing = dict([*_ends(tree, tied), *_said(tree), *_unlike_siblings(tree)])
    for name, why in _without_companions(tree):
        # of a part that may have several names, its siblings have told the right one
        parent = name.rpartition(".")[0]
        if not any(other.rpartition(".")[0] == parent for other in missing):
            missing[name] = why
    return fold_problems(
        Problem(name, f"the checkpoint lacks it: {why}{tree.hint(name)}", _REMEDY, "whole-model")
        for name, why in missing.items()
    )


def _ends(tree: Tree, tied: Mapping[str, str]) -> Missing:
    """Yield what is missing before and behind the blocks of a decoder.

    Of a family that is not known, names that may be theirs count wherever no block is.
    """
    if not tree.decoder:
        return
    root = tree.root
    held = tree.children[root] if tree.is_known else tree.outside
    blocks = tree.stacks[tree.decoder].values()
    has_norms = tree.said.get("do_layer_norm_before") or any(
        _FIRST_NORM.search(name) for names in blocks for name in names
    )
    is_embedded = held & (tree.family.embeddings - POSITIONS)
    if not is_embedded and (tree.is_known or not any(map(_EMBEDDING.match, held))):
        yield f"{root}.embed_tokens", "every model has one"
    if has_norms and not any(map(_NORM.search, held)):
        yield f"{root}.norm", "there is one behind the last block"
    has_biases = any("input_layernorm.bias" in names for names in blocks)
    if tree.is_known and has_biases and not any(name.endswith("norm.bias") for name in held):
        yield f"{root}.norm.bias", "other norms have one"
    ties = ties_head(tree.config) or tree.said.get(TIES_HEAD)
    if not tied and not ties and (tree.is_known or TIES_HEAD in tree.said):
        around = [module for module in tree.children if f"{root}.".startswith(module)]
        held = held.union(*map(tree.children.__getitem__, around))
        is_headed = held & tree.family.lm_heads
        if not is_headed and (tree.is_known or not any(map(_HEAD.search, held))):
            yield "lm_head", "tie_word_embeddings is not true in config.json"


def _said(tree: Tree) -> Missing:
    blocks = count_of(tree.said, "num_hidden_layers")
    yield from _numbered(tree, tree.decoder, blocks, "num_hidden_layers is {}")
    vision = tree.config.get("vision_config")
    if isinstance(vision, Mapping) and tree.is_all_known:
        depth = count_of(vision, "depth", "num_hidden_layers")
        yield from _numbered(tree, tree.tower, depth, "vision_config has {} blocks")
    experts = count_of(tree.said, "num_experts", "num_local_experts", "n_routed_experts")
    for stack in tree.stacks:
        if stack.endswith(".experts") and stack.startswith(f"{tree.decoder}."):
            yield from _numbered(tree, stack, experts, "the number of experts is {}")
    if not tree.is_known:
        return
    has_bias = bool(tree.said.get("attention_bias"))
    is_biased = tree.family.has_biased_router or tree.said.get("topk_method") == "noaux_tc"
    has_shared = bool(count_of(tree.said, "n_shared_experts"))
    for module, held in tree.children.items():
        if not module.startswith(f"{tree.decoder}."):
            continue
        if has_bias and "k_proj" in held:
            for name in ("q_proj", "k_proj", "v_proj"):
                if f"{name}.bias" not in held and f"{module}.{name}" in tree.floats:
                    yield f"{module}.{name}.bias", "attention_bias is true in config.json"
        if is_biased and "gate" in held and "gate.e_score_correction_bias" not in held:
            yield f"{module}.gate.e_score_correction_bias", "its router chooses experts by one"
        if has_shared and "experts" in held and "shared_experts" not in held:
            yield f"{module}.shared_experts", "config.json says n_shared_experts"


def _numbered(tree: Tree, stack: str, count: int, why: str) -> Missing:
    """Yield the members of a stack that are not there, of as many as config.json says."""
    before = -1
    for number in [*sorted(n for n in tree.stacks.get(stack, ()) if n < count), count]:
        if stack in tree.stacks and number > before + 1:
            run = str(before + 1) if number == before + 2 else f"{before + 1}-{number - 1}"
            yield f"{stack}.{run}", f"{why.format(count)} in config.json"
        before = number


def _unlike_siblings(tree: Tree) -> Missing:
    """Yield what most blocks of a kind hold and one does not."""
    for stack, blocks in tree.stacks.items():
        kinds: dict[object, list[int]] = {}
        for number in blocks:
            kind = block_kind(tree.config, number) if stack == tree.decoder else None
            kinds.setdefault(kind, []).append(number)
        for numbers in kinds.values():
            yield from _unlike(tree, stack, numbers)


def _unlike(tree: Tree, stack: str, numbers: Sequence[int]) -> Missing:
    blocks = [frozenset(tree.stacks[stack][number]) for number in numbers]
    alike = Counter(blocks)
    if len(alike) < 2:
        return
    is_known, is_all_known = stack == tree.decoder and tree.is_known, tree.knows(stack)
    held = Counter(name for block in blocks for name in block)
    is_one_apart = max(alike.values()) == len(blocks) - 1
    if not is_one_apart and not is_known and stack != tree.decoder and not is_all_known:
        return
    # of two, either may be the one that lacks something
    usual = {name for name, n in held.items() if 2 * n > len(blocks) or len(blocks) == 2}
    told: list[str] = []
    for number, block in zip(numbers, blocks, strict=True):
        lacking = {x for x in usual - block if f"{stack}.{number}.{x}" not in tree.biases}
        is_another = alike[block] > 1 or 2 * len(lacking) > len(usual)
        if not is_known and (is_another or (len(blocks) == 2 and not is_all_known)):
            continue  # of another kind, for all that is known
        for name in sorted(lacking, key=lambda name: -tree.count(name)):
            # where a letter is flipped in one of two, the rarer name is the wrong one
            if not any(is_a_letter_off(name, other) for other in told):
                told.append(name)
                yield f"{stack}.{number}.{name}", f"other blocks of {stack} have one"


def _without_companions(tree: Tree) -> Missing:
    """Yield what a module lacks, by the rest that it has."""
    groups = [[word.lstrip("&").split("|") for word in part.split()] for part in tree.family.parts]
    asks = [
        frozenset(name for word in part.split() if word[0] != "&" for name in word.split("|"))
        for part in tree.family.parts
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
    for module, children in tree.children.items():
        for name in children:
            layer = name.removesuffix(".bias")
            # a head may be tied and have a bias
            if layer != name and layer not in children and not _HEAD.search(layer):
                yield f"{module}.{layer}", "it has a bias"
        for index, lacking in lacking_of(tree.names_in(module)):
            found.setdefault((without_numbers(module), index), {})[module] = lacking
    for modules in found.values():
        lacking_modules = {module: names for module, names in modules.items() if names}
        is_one_alone = len(lacking_modules) == 1 < len(modules)
        for module, lacking in lacking_modules.items():
            # where that is not known, modules may be made of other parts; but not one alone
            if not is_one_alone and not tree.knows(module):
                continue
            for names in lacking:
                kind = last_component(module)
                first, *others = sorted(names, key=lambda name: -tree.spelled[kind, name])
                named = f", or {' or '.join(others)}" if others else ""
                yield f"{module}.{first}".strip("."), f"it goes with what is beside it{named}"
