"""Rounding to codes with a scale under a quadratic loss, tr(E H E'), E = rounded - W.

1. Groups, columns that share a scale, are taken in the order of their share of H, columns inside
   one by their diagonal. What is stored keeps its order.
2. H = M diag(D) M', M unit upper triangular: then tr(E H E') = sum_k D_k (t_k - rounded_k)^2 with
   t_k = w_k - sum_{j<k} e_j M_jk, what column k should be, given the errors before it.
3. Scale and zero point of a group are searched on t before its first column is rounded.
4. Descent: codes, then scale, then zero point of a group at a time move to where the loss of the
   whole row is least, all else fixed. No step can raise it.

Rows are independent of each other but where they share scales. Tensors are laid out K first here: a
column of the weight is a row in memory, so that every step is one operation over all output
features.
Source: GPTQ (arXiv:2210.17323) for the feedback, in the form of its factor without an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from mixedprec_plugin.quantize import feedback_cpu
from mixedprec_plugin.quantize.loops import over_rows
from mixedprec_plugin.quantize.rounding import Grid, Levels, Tiles

NUM_SWEEPS = 3
# of the mean of H's diagonal, for the factorization alone
_DAMPING = 0.002
# columns between which errors are fed back one by one; further ones get theirs by products
_CHUNK = 128

AnyGrid: TypeAlias = Grid | Tiles


class Rounded(NamedTuple):
    """Codes of a weight.

    Attributes:
        codes: [N, K], uint8, or of the tiles' dtype.
        scales: float32 [N, groups], numbers of the grid's dtype.
        zeros: int16 [N, groups].
        errors: E, float32 [N, K].
        losses: the diagonal of E H E', float64 [N].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    errors: torch.Tensor
    losses: torch.Tensor


def round_with_feedback(
    weight: torch.Tensor,
    H: torch.Tensor,
    group_size: int,
    grid: AnyGrid,
    num_sweeps: int = NUM_SWEEPS,
) -> Rounded:
    """Round a weight so that tr(E H E') is small.

    Args:
        weight: [N, K], floating point; not modified.
        H: float32 [K, K], symmetric, positive semidefinite; not modified.
        group_size: elements along K that share a scale; the last group may be smaller.
        num_sweeps: of the descent.
    Raises:
        ValueError: H is not finite, or all zero.
    """
    mean = float(H.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise ValueError(f"the mean of H's diagonal is {mean}")
    groups = _ordered(H, group_size)
    order = torch.cat(groups)
    H = H[order][:, order].div_(mean)
    H.diagonal().add_(_DAMPING)
    M, D = _factor(H)
    targets = weight.t()[order].float()
    state = _State.empty(targets, groups, grid)
    _feed_back(state, targets, M, D)
    del M
    gradient = H @ state.errors
    for _ in range(num_sweeps):
        _descend(state, gradient, H)
    # what was added to the diagonal is no loss
    gradient.add_(state.errors, alpha=-_DAMPING)
    losses = (state.errors * gradient).sum(0, dtype=torch.float64).mul_(mean)
    return _in_order(state, order, group_size, losses)


class _State(NamedTuple):
    """Where the rounding is.

    Attributes:
        codes, errors: float32 [K, N].
        scales, zeros: float32 [groups, N].
        columns: of each group.
        tiles: int64 [N], which rows share a scale; None where each has its own.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    errors: torch.Tensor
    columns: Sequence[slice]
    grid: AnyGrid
    tiles: torch.Tensor | None

    @classmethod
    def empty(cls, targets: torch.Tensor, groups: Sequence[torch.Tensor], grid: AnyGrid) -> _State:
        N = targets.shape[1]
        scales = torch.empty(len(groups), N, device=targets.device)
        columns, first = [], 0
        for group in groups:
            columns.append(slice(first, first + len(group)))
            first += len(group)
        rows = grid.rows or N
        tiles = torch.arange(N, device=targets.device) // rows if rows > 1 else None
        return cls(
            torch.empty_like(targets), scales, torch.empty_like(scales),
            torch.empty_like(targets), columns, grid, tiles,
        )  # fmt: skip

    def shared(self, values: torch.Tensor, reduce: str = "sum") -> torch.Tensor:
        """Values [..., N], summed over the rows that share a scale."""
        if self.tiles is None:
            return values
        index = self.tiles.expand_as(values)
        sums = values.new_zeros(*values.shape[:-1], int(self.tiles[-1]) + 1)
        return sums.scatter_reduce_(-1, index, values, reduce).gather(-1, index)


def _ordered(H: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Groups by falling trace of their blocks, columns of each by falling diagonal."""
    found = []
    for group in torch.split(torch.arange(len(H), device=H.device), group_size):
        own = H.diagonal()[group]
        found.append((float(own.sum()), group[own.argsort(descending=True)]))
    return [group for _, group in sorted(found, key=lambda one: -one[0])]


def _factor(H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = M diag(D) M', M unit upper triangular: M float32 [K, K], D float32 [K]."""
    lower = torch.linalg.cholesky(H.double().flip(0, 1))
    root = lower.flip(0, 1).diagonal()
    return (lower.flip(0, 1) / root).float(), root.square().float()


def _chunks(columns: slice) -> list[slice]:
    firsts = range(columns.start, columns.stop, _CHUNK)
    return [slice(first, min(first + _CHUNK, columns.stop)) for first in firsts]


def _feed_back(state: _State, targets: torch.Tensor, M: torch.Tensor, D: torch.Tensor) -> None:
    """Search each group's scale and zero, and round its columns, errors fed back; fills `state`."""
    weight = targets.clone()
    for group, columns in enumerate(state.columns):
        own = targets[columns]
        low, high = own.amin(0).clamp_(max=0), own.amax(0).clamp_(min=0)
        low, high = state.shared(low, "amin"), state.shared(high, "amax")
        scales, zeros = state.grid.candidates(low, high)
        losses = state.shared(_search(own, D[columns], scales, zeros, state.grid))
        best = losses.argmin(0, keepdim=True)
        state.scales[group], state.zeros[group] = (x.gather(0, best)[0] for x in (scales, zeros))
        for chunk in _chunks(columns):
            _round_columns(state, targets[chunk], weight[chunk], M[chunk, chunk], group, chunk)
            targets[chunk.stop :].addmm_(M[chunk, chunk.stop :].t(), state.errors[chunk], alpha=-1)


def _search(
    targets: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: AnyGrid,
) -> torch.Tensor:
    """What each candidate costs each row, in weighted squared error: [C, N]."""
    if _is_compiled(targets):
        losses = torch.empty_like(scales)
        _run(feedback_cpu.search, grid, targets, importance, scales, zeros, losses)
        return losses
    rows = []
    for scale, zero in zip(scales, zeros, strict=True):
        codes = _nearest(targets * scale.reciprocal(), grid.levels)
        codes = codes.clamp_(grid.lowest_code - zero, grid.largest_code - zero)
        error = codes.mul_(scale).sub_(targets).square_()
        rows.append(error.mul_(importance[:, None]).sum(0))
    return torch.stack(rows)


def _round_columns(
    state: _State,
    targets: torch.Tensor,
    weight: torch.Tensor,
    M: torch.Tensor,
    group: int,
    columns: slice,
) -> None:
    """Round columns of a group in turn, each error fed back to the later ones."""
    codes, errors, grid = state.codes[columns], state.errors[columns], state.grid
    scale, zero = state.scales[group], state.zeros[group]
    if _is_compiled(targets):
        arrays = targets, weight, M.contiguous(), scale, zero, codes, errors
        _run(feedback_cpu.round_columns, grid, *arrays)
        return
    inverse, targets = scale.reciprocal(), targets.clone()
    for k in range(len(targets)):
        code = _nearest(targets[k] * inverse, grid.levels).add_(zero)
        code = code.clamp_(grid.lowest_code, grid.largest_code)
        error = torch.sub(code, zero).mul_(scale).sub_(weight[k])
        codes[k], errors[k] = code, error
        targets[k + 1 :].addr_(M[k, k + 1 :], error, alpha=-1)


def _nearest(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The nearest codes to numbers, which may be overwritten."""
    if not levels.bits:
        return values.round_()
    _, exponents = torch.frexp(values)
    steps = torch.ldexp(torch.ones_like(values), exponents - levels.bits).clamp_(min=levels.step)
    return values.div_(steps).round_().mul_(steps)


def _is_compiled(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _run(kernel: Any, grid: AnyGrid, *tensors: torch.Tensor) -> None:
    """Run a loop over output features, the last dimension of the first tensor."""
    arrays = [tensor.numpy() for tensor in tensors]
    limits = float(grid.lowest_code), float(grid.largest_code)
    levels = feedback_cpu.code_levels(grid.levels)
    num_rows = tensors[0].shape[-1]
    over_rows(kernel, num_rows, *arrays, *limits, levels, multiple=feedback_cpu.TILE)


def _descend(state: _State, gradient: torch.Tensor, H: torch.Tensor) -> None:
    """Move each group to where the loss is least; `gradient` is H @ errors, kept up to date."""
    for group, columns in enumerate(state.columns):
        change = _move_group(state, gradient[columns].clone(), H[columns, columns], group)
        gradient.addmm_(H[:, columns], change)
        state.errors[columns] += change


def _move_group(state: _State, gradient: torch.Tensor, H: torch.Tensor, group: int) -> torch.Tensor:
    """Move a group's codes, scale and zero, each where the loss falls; returns the errors' change.

    `gradient` [G, N] is the group's, and overwritten; H is its block [G, G].
    """
    grid, codes = state.grid, state.codes[state.columns[group]]
    scale, zero = state.scales[group], state.zeros[group]
    change = torch.empty_like(gradient)
    chunks = _chunks(slice(0, len(H)))
    for own in chunks:
        # the loop keeps up to date what it sees, and products the rest
        seen = gradient[own].clone() if len(chunks) > 1 else gradient
        _move_codes(codes[own], seen, H[own, own].contiguous(), scale, grid, change[own])
        if len(chunks) > 1:
            gradient.addmm_(H[:, own], change[own])
    centred = codes - zero
    curved = H @ centred
    slope, curve = (state.shared((centred * x).sum(0)) for x in (gradient, curved))
    moved = scale - torch.where(curve > 0, slope / curve, 0.0)
    moved = grid.store(moved.abs()) * scale.sign()
    step = moved - scale
    # the loss is a parabola along a scale, and where the scale can be stored it may be higher
    step = torch.where(step * (2 * slope + step * curve) < 0, step, 0.0)
    state.scales[group] += step
    change.addcmul_(centred, step)
    gradient.addcmul_(curved, step)
    if not grid.symmetric:
        scale, slope, curve = state.scales[group], gradient.sum(0), H.sum()
        moved = zero + torch.where(slope * scale > 0, 1.0, -1.0)
        step = (zero - moved) * scale
        falls = (
            (step * (2 * slope + step * curve) < 0) & (moved >= 0) & (moved <= grid.largest_code)
        )
        state.zeros[group] = torch.where(falls, moved, zero)
        change += torch.where(falls, step, 0.0)
    return change


def _move_codes(
    codes: torch.Tensor,
    gradient: torch.Tensor,
    H: torch.Tensor,
    scale: torch.Tensor,
    grid: AnyGrid,
    change: torch.Tensor,
) -> None:
    """Move each code to where the loss is least, the others as they are; fills `change`."""
    if _is_compiled(codes):
        _run(feedback_cpu.move_codes, grid, codes, gradient, H, scale, change)
        return
    inverse = scale.reciprocal()
    for k, diagonal in enumerate(H.diagonal().tolist()):
        best = torch.mul(gradient[k], inverse).mul_(-1 / diagonal).add_(codes[k])
        moved = _nearest(best, grid.levels).clamp_(grid.lowest_code, grid.largest_code)
        change[k] = moved.sub(codes[k]).mul_(scale)
        codes[k] = moved
        gradient.addr_(H[k], change[k])


def _in_order(state: _State, order: torch.Tensor, group_size: int, losses: torch.Tensor) -> Rounded:
    """The codes where their columns lie in the weight."""
    dtype = state.grid.dtype if isinstance(state.grid, Tiles) else torch.uint8
    codes, errors = torch.empty_like(state.codes), torch.empty_like(state.errors)
    codes[order], errors[order] = state.codes, state.errors
    groups = torch.stack([order[columns.start] for columns in state.columns]) // group_size
    scales, zeros = torch.empty_like(state.scales), torch.empty_like(state.zeros)
    scales[groups], zeros[groups] = state.scales, state.zeros
    return Rounded(
        codes.t().contiguous().to(dtype), scales.t().contiguous(), zeros.t().contiguous().short(),
        errors.t(), losses,
    )  # fmt: skip
