"""A transformers model whose layers are given what an engine's were given, one after the other.

Two correct models do not stay together: a value that lies between two codes of quantized
activations, or a token between two experts, falls to one side in one and to the other in the
other, and what follows differs. So each layer is held against the reference's on the same input:
what the reference computed by itself is measured, and what the engine had is put in its place.
The sums of the residual stream are the reference's own throughout.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from benchmarks.families.trace import Trace

# half a unit in the last place of bfloat16: what one rounding changes a value by, at most
ROUNDING = 2.0**-8
# roundings that a router's logits are moved by to see what they explain: one at most where it
# had the engine's input, and any number where it had its own
_ROUNDINGS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
_MORE_ROUNDINGS = (*_ROUNDINGS, *(2.0**n for n in range(1, 8)))
# SGLang absorbs it into the products beside it, and never calls it
_ABSORBED = "kv_b_proj"


@dataclasses.dataclass
class Steps:
    """What was found on the way.

    Attributes:
        errors: module -> the greatest distance of one of its input rows from the engine's, as a
            part of that row's norm.
        tied: tokens that reference and engine sent to different experts, and a rounding of the
            router's logits explains it: the reference followed.
        elsewhere: as `tied`, where it does not.
        num_choices: tokens that were sent to experts, in all layers.
        missing: modules that the reference ran and the engine did not.
    """

    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    tied: int = 0
    elsewhere: int = 0
    num_choices: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)

    @property
    def worst(self) -> float:
        """The greatest distance of all."""
        return max(self.errors.values(), default=0.0)


class Follower:
    """Makes a transformers model take an engine's inputs, or only its choices of experts.

    Args:
        trace: the engine's.
        takes_inputs: whether layers are given the engine's inputs.
    """

    def __init__(self, trace: Trace, *, takes_inputs: bool) -> None:
        self.steps = Steps()
        self._trace = trace
        self._takes_inputs = takes_inputs
        self._forward = 0

    def advance(self) -> None:
        """Go on to the engine's next forward."""
        self._forward += 1

    def follow_input(self, layer: torch.nn.Module, module: str) -> None:
        """Have a layer take the inputs of a planned module."""
        if self._takes_inputs:
            layer.register_forward_pre_hook(self._replacer(module), with_kwargs=True)

    def follow_choices(self, router: torch.nn.Module, module: str) -> None:
        """Have a router choose the experts that the engine's chose, where rounding explains it."""
        chooser = _chooser(router)

        def follow(_router: Any, _args: Any, out: tuple[torch.Tensor, ...]) -> Any:
            chosen = self._trace.choices[module][self._forward].long()
            return self._chosen(chooser, out, chosen)

        router.register_forward_hook(follow)

    def _replacer(self, module: str) -> Any:
        def replace(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = self._trace.inputs.get(module)
            if inputs is None:
                if not module.endswith(_ABSORBED):
                    self.steps.missing.add(module)
                return None
            own = args[0] if args else kwargs["hidden_states"]
            theirs = inputs[self._forward].reshape(own.shape)
            error = relative_error(own, theirs)
            self.steps.errors[module] = max(error, self.steps.errors.get(module, 0.0))
            if args:
                return (theirs, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": theirs}

        return replace

    def _chosen(
        self, chooser: torch.nn.Module, out: tuple[torch.Tensor, ...], chosen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        logits, weights, ids = out[0].float(), out[1].clone(), out[2].clone()
        self.steps.num_choices += len(ids)
        others = (ids.sort(1).values != chosen.sort(1).values).any(1)
        for row in others.nonzero().flatten():
            found = self._moved(chooser, logits[row], chosen[row])
            if found is None:
                self.steps.elsewhere += 1
                continue
            self.steps.tied += 1
            weights[row], ids[row] = found[0].to(weights.dtype), found[1]
        return out[0], weights, ids

    def _moved(
        self, chooser: torch.nn.Module, logits: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and ids of the engine's choice, by the least change of logits [E] to it.

        Its experts' logits are moved up, and those of the others down.
        """
        direction = -torch.ones_like(logits)
        direction[chosen] = 1.0
        for roundings in _ROUNDINGS if self._takes_inputs else _MORE_ROUNDINGS:
            moved = logits + roundings * ROUNDING * logits.abs() * direction
            _, weights, ids = chooser(moved[None])
            if ids[0].sort().values.equal(chosen.sort().values):
                return weights[0], ids[0]
        return None


def relative_error(own: torch.Tensor, theirs: torch.Tensor) -> float:
    """Greatest distance of a row of [..., K] from the other's, as a part of its norm.

    A row of zeros, which the embedding of a padding token is, is compared as it is; what is not a
    number is infinitely far.
    """
    difference = (own.float() - theirs.float()).norm(dim=-1)
    norm = theirs.float().norm(dim=-1)
    ratio = difference / torch.where(norm == 0, 1.0, norm)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def _chooser(router: Any) -> Any:
    """A router that is given logits [T, E] instead of hidden states."""
    made = copy.deepcopy(router)
    made.hidden_dim = len(router.weight)
    made.weight = torch.nn.Parameter(torch.eye(made.hidden_dim))
    return made
