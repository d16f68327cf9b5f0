"""What every linear layer reads, how much its outputs matter, and what attention caches."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.families.names import ExpertShard, shard_order
from mixedprec_plugin.plan.model import PlannedLayer


class Held(NamedTuple):
    """Tokens that a layer saw of text which is held out, but for the first of each window.

    Attributes:
        x: its inputs, bfloat16 [T, K].
        gradients: of its outputs, float32 [T, N], for they may be orthogonal to these; None
            without gradients.
    """

    x: torch.Tensor
    gradients: torch.Tensor | None


class Seen(NamedTuple):
    """Tokens that a layer saw.

    Attributes:
        x: pieces of its inputs, bfloat16 [T, K].
        weights: for each piece, the mean over outputs of the squared gradient, float32 [T].
        held: pieces of text that is held out; not among the others.
    """

    x: list[torch.Tensor]
    weights: list[torch.Tensor]
    held: list[Held]


def joined(parts: Iterable[Seen]) -> Seen:
    """Tokens that several layers, or ranks, saw, in their order."""
    seen = Seen([], [], [])
    for part in parts:
        seen.x.extend(part.x)
        seen.weights.extend(part.weights)
        seen.held.extend(part.held)
    return seen


class Capture(TorchFunctionMode):
    """Keeps the inputs and the gradients of `torch.nn.functional.linear` while it is entered.

    Layers that read the same tensor share its copy. Of experts in one parameter, each product is
    told by where its matrix begins.

    Args:
        network: its parameters are looked at once, as they are loaded now.
        wanted: names of the layers to keep tokens of.
        gradients: whether tokens are weighed by them, or all count alike.

    Attributes:
        is_held_out: whether what runs now is of text that is held out.
        maxima: `key` and `value` -> the largest magnitude that attention caches, behind norm and
            rotation; without gradients alone, and empty where no attention ran.
    """

    def __init__(self, network: Network, wanted: Collection[str], *, gradients: bool) -> None:
        super().__init__()
        self._gradients, self.is_held_out = gradients, False
        self.seen: dict[str, Seen] = {}
        self.maxima: dict[str, torch.Tensor] = {}
        self._owners: dict[int, list[PlannedLayer]] = {}
        for name, parameter in network.model.named_parameters():
            parts = [part for part in network.parts.get(name, ()) if part.name in wanted]
            if parts and not parameter.is_meta:
                self._owners[parameter.untyped_storage().data_ptr()] = parts
        self._last: tuple[Any, torch.Tensor] = (None, torch.empty(0))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; of a product, keep its inputs, and its gradient once that is known."""
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and self._owners:
            x, weight = args[0], args[1]
            parts = self._owners.get(weight.untyped_storage().data_ptr(), [])
            if parts := _of_product(parts, weight):
                self._keep(parts, x, result)
        elif func is functional.scaled_dot_product_attention and not self._gradients:
            for number, part in ((1, "key"), (2, "value")):
                states = args[number] if number < len(args) else (kwargs or {})[part]
                largest = states.detach().abs().max().float().cpu()
                self.maxima[part] = torch.maximum(self.maxima.get(part, largest), largest)
        return result

    def __exit__(self, *error: Any) -> None:
        """Let go of the last inputs: their graph holds the hooks, and these hold this object."""
        self._last = (None, torch.empty(0))
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _keep(self, parts: list[PlannedLayer], x: torch.Tensor, result: torch.Tensor) -> None:
        if self._last[0] is not x:
            self._last = (x, x.detach().reshape(-1, x.shape[-1]).bfloat16())
        inputs, is_held_out = self._last[1], self.is_held_out

        def keep(gradient: torch.Tensor) -> None:
            flat, first = gradient.reshape(-1, gradient.shape[-1]), 0
            for part in parts:
                assert part.stored is not None
                rows = flat[:, first : first + part.stored.N]
                first += part.stored.N
                seen = self.seen.setdefault(part.name, Seen([], [], []))
                if is_held_out:
                    is_counted = _behind_first(gradient)
                    own = rows[is_counted].float() if self._gradients else None
                    seen.held.append(Held(inputs[is_counted], own))
                    continue
                seen.x.append(inputs)
                seen.weights.append(rows.float().square().mean(1))

        if self._gradients:
            result.register_hook(keep)  # type: ignore[no-untyped-call]
        else:
            keep(torch.ones_like(result))


def _behind_first(outputs: torch.Tensor) -> torch.Tensor:
    """Which of a layer's tokens are not the first of their window, bool [T]; experts do not tell.

    A first token is an attention sink: its states are a thousand times as large as others', and it
    counts once in a short window where a served one has it once in thousands.
    """
    is_counted = torch.ones(outputs.shape[:-1], dtype=torch.bool, device=outputs.device)
    if outputs.dim() == 3 and outputs.shape[1] > 1:
        is_counted[:, 0] = False
    return is_counted.flatten()


def _of_product(parts: list[PlannedLayer], weight: torch.Tensor) -> list[PlannedLayer]:
    """The layers whose rows a matrix [N, K] is, in their order; all but experts are alone."""
    if not parts or not isinstance(parts[0].shard, ExpertShard):
        return parts
    index = weight.storage_offset() // weight.numel()
    own = [p for p in parts if isinstance(p.shard, ExpertShard) and p.shard.expert == index]
    return sorted(own, key=lambda part: shard_order(part.shard))
