"""Rounding to integers in groups along K under a quadratic loss, tr(E H E'), E = rounded - W.

1. Groups are taken in the order of their share of H, columns inside one by their diagonal. What is
   stored keeps its order.
2. H = M diag(D) M', M unit upper triangular: then tr(E H E') = sum_k D_k (t_k - rounded_k)^2 with
   t_k = w_k - sum_{j<k} e_j M_jk, what column k should be, given the errors before it.
3. Scale and zero point of a group are searched on t before its first column is rounded.
4. Descent: codes, then scale, then zero point of a group at a time move to where the loss of the
   whole row is least, all else fixed. No step can raise it.

Rows are independent of each other. Tensors are laid out K first here: a column of the weight is a
row in memory, so that every step is one operation over all output features.
Source: GPTQ (arXiv:2210.17323) for the feedback, in the form of its factor without an inverse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mixedprec_plugin.quantize import feedback_cpu
from mixedprec_plugin.quantize.rounding import Grid, store_scale

NUM_SWEEPS = 3
# multiples of the plain scale that are tried
_RATIOS = tuple(1.06 - 0.03 * step for step in range(13))
_SYMMETRIC_RATIOS = (1.10, 1.07, 1.04, 1.0, *_RATIOS[3:])
# of the mean of H's diagonal, for the factorization alone
_DAMPING = 0.002


class Rounded(NamedTuple):
    """Codes of a weight.

    Attributes:
        codes: uint8 [N, K].
        scales: float32 [N, K/G], numbers of the grid's dtype.
        zeros: int16 [N, K/G].
        loss: tr(E H E'), over all rows.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    loss: float


def round_with_feedback(
    weight: torch.Tensor,
    H: torch.Tensor,
    group_size: int,
    grid: Grid,
    num_sweeps: int = NUM_SWEEPS,
) -> Rounded:
    """Round a weight so that tr(E H E') is small.

    Args:
        weight: [N, K], floating point; not modified.
        H: float32 [K, K], symmetric, positive semidefinite; not modified.
        group_size: elements along K that share a scale; divides K.
        num_sweeps: of the descent.
    Raises:
        ValueError: H is not finite, or all zero.
    """
    K = weight.shape[1]
    mean = float(H.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise ValueError(f"the mean of H's diagonal is {mean}")
    order = _order(H, group_size)
    H = H[order][:, order].div_(mean)
    H.diagonal().add_(_DAMPING)
    M, D = _factor(H)
    targets = weight.t()[order].float()
    scales = torch.empty(K // group_size, weight.shape[0], device=weight.device)
    state = _State(
        torch.empty_like(targets), scales, torch.empty_like(scales), torch.empty_like(targets)
    )
    _feed_back(state, targets, M, D, grid, group_size)
    del M
    gradient = H @ state.errors
    for _ in range(num_sweeps):
        _descend(state, gradient, H, grid, group_size)
    # what was added to the diagonal is no loss
    gradient.add_(state.errors, alpha=-_DAMPING)
    loss = mean * float((state.errors * gradient).sum(dtype=torch.float64))
    return _in_order(state, order, group_size, loss)


class _State(NamedTuple):
    """Where the rounding is: codes [K, N], scales and zeros [K/G, N], errors [K, N]; float32."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    errors: torch.Tensor


def _order(H: torch.Tensor, group_size: int) -> torch.Tensor:
    """Groups by falling trace of their blocks, columns of each by falling diagonal: int64 [K]."""
    diagonal = H.diagonal().view(-1, group_size)
    groups = diagonal.sum(1).argsort(descending=True)
    return (groups[:, None] * group_size + diagonal.argsort(1, descending=True)[groups]).flatten()


def _factor(H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H = M diag(D) M', M unit upper triangular: M float32 [K, K], D float32 [K]."""
    lower = torch.linalg.cholesky(H.double().flip(0, 1))
    root = lower.flip(0, 1).diagonal()
    return (lower.flip(0, 1) / root).float(), root.square().float()


def _feed_back(
    state: _State,
    targets: torch.Tensor,
    M: torch.Tensor,
    D: torch.Tensor,
    grid: Grid,
    group_size: int,
) -> None:
    """Search each group's scale and zero, and round its columns, errors fed back; fills `state`."""
    weight = targets.clone()
    for group, first in enumerate(range(0, len(targets), group_size)):
        columns = slice(first, first + group_size)
        scales, zeros = _candidates(targets[columns], grid)
        best = _search(targets[columns], D[columns], scales, zeros, grid)
        scale, zero = (one.gather(0, best[None])[0] for one in (scales, zeros))
        state.scales[group], state.zeros[group] = scale, zero
        _round_columns(state, targets[columns], weight[columns], M[columns, columns], grid, group)
        targets[columns.stop :].addmm_(
            M[columns, columns.stop :].t(), state.errors[columns], alpha=-1
        )


def _candidates(targets: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [C, N] to try for a group's targets [G, N]."""
    low, high = targets.amin(0).clamp_(max=0), targets.amax(0).clamp_(min=0)
    half = (grid.largest_code + 1) / 2
    if grid.symmetric:
        ratios = torch.tensor(_SYMMETRIC_RATIOS, device=targets.device)[:, None]
        scales = store_scale(torch.maximum(high, -low) * ratios / half, grid.scale_dtype)
        scales = torch.cat([scales, -scales])
        return scales, torch.full_like(scales, half)
    ratios = torch.tensor(_RATIOS, device=targets.device)[:, None]
    scales = store_scale((high - low) * ratios / grid.largest_code, grid.scale_dtype)
    middle = (half - 0.5 - (low + high) / 2 / scales).round_()
    zeros = torch.cat([(middle + step).clamp_(0, grid.largest_code) for step in (0, -1, 1)])
    return scales.repeat(3, 1), zeros


def _search(
    targets: torch.Tensor,
    importance: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """The candidate of least weighted squared error of each row: int64 [N]."""
    if _is_compiled(targets):
        best = torch.zeros(targets.shape[1], dtype=torch.int64)
        arrays = _arrays(targets, importance, scales, zeros)
        _run(feedback_cpu.search, targets, *arrays, grid.largest_code, best.numpy())
        return best
    losses = []
    for scale, zero in zip(scales, zeros, strict=True):
        codes = torch.mul(targets, scale.reciprocal()).round_()
        codes = codes.clamp_(-zero, grid.largest_code - zero)
        error = codes.mul_(scale).sub_(targets).square_()
        losses.append(error.mul_(importance[:, None]).sum(0))
    return torch.stack(losses).argmin(0)


def _round_columns(
    state: _State,
    targets: torch.Tensor,
    weight: torch.Tensor,
    M: torch.Tensor,
    grid: Grid,
    group: int,
) -> None:
    """Round a group's columns in turn, each error fed back to the later ones."""
    G = len(targets)
    codes, errors = (x[group * G : (group + 1) * G] for x in (state.codes, state.errors))
    scale, zero = state.scales[group], state.zeros[group]
    if _is_compiled(targets):
        arrays = _arrays(targets, weight, M.contiguous(), scale, zero)
        made = codes.numpy(), errors.numpy()
        _run(feedback_cpu.round_columns, targets, *arrays, grid.largest_code, *made)
        return
    inverse, targets = scale.reciprocal(), targets.clone()
    for k in range(G):
        code = torch.mul(targets[k], inverse).round_().add_(zero).clamp_(0, grid.largest_code)
        error = torch.sub(code, zero).mul_(scale).sub_(weight[k])
        codes[k], errors[k] = code, error
        targets[k + 1 :].addr_(M[k, k + 1 :], error, alpha=-1)


def _run(kernel: Any, shaped: torch.Tensor, *arguments: Any) -> None:
    feedback_cpu.over_rows(kernel, torch.get_num_threads(), shaped.shape[1], *arguments)


def _is_compiled(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    return [tensor.numpy() for tensor in tensors]


def _descend(
    state: _State, gradient: torch.Tensor, H: torch.Tensor, grid: Grid, group_size: int
) -> None:
    """Move each group to where the loss is least; `gradient` is H @ errors, kept up to date."""
    for group, first in enumerate(range(0, len(H), group_size)):
        columns = slice(first, first + group_size)
        change = _move_group(state, gradient[columns].clone(), H[columns, columns], grid, group)
        gradient.addmm_(H[:, columns], change)
        state.errors[columns] += change


def _move_group(
    state: _State, gradient: torch.Tensor, H: torch.Tensor, grid: Grid, group: int
) -> torch.Tensor:
    """Move a group's codes, scale and zero, each where the loss falls.

    Args:
        gradient: [G, N] of the group, overwritten.
        H: the group's block [G, G].
    Returns:
        the change of the errors, [G, N].
    """
    G = len(H)
    codes = state.codes[group * G : (group + 1) * G]
    scale, zero = state.scales[group], state.zeros[group]
    change = torch.empty_like(gradient)
    _move_codes(codes, gradient, H.contiguous(), scale, grid, change)
    centred = codes - zero
    curved = H @ centred
    slope, curve = (centred * gradient).sum(0), (centred * curved).sum(0)
    moved = scale - torch.where(curve > 0, slope / curve, 0.0)
    moved = store_scale(moved.abs(), grid.scale_dtype) * scale.sign()
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
    grid: Grid,
    change: torch.Tensor,
) -> None:
    """Move each code to where the loss is least, the others as they are; fills `change`."""
    if _is_compiled(codes):
        arrays = _arrays(codes, gradient, H, scale)
        _run(feedback_cpu.move_codes, codes, *arrays, grid.largest_code, change.numpy())
        return
    inverse = scale.reciprocal()
    for k, diagonal in enumerate(H.diagonal().tolist()):
        moved = torch.mul(gradient[k], inverse).mul_(-1 / diagonal).round_().add_(codes[k])
        change[k] = moved.clamp_(0, grid.largest_code).sub(codes[k]).mul_(scale)
        codes[k] = moved
        gradient.addr_(H[k], change[k])


def _in_order(state: _State, order: torch.Tensor, group_size: int, loss: float) -> Rounded:
    """The codes where their columns lie in the weight."""
    codes = torch.empty_like(state.codes, dtype=torch.uint8)
    codes[order] = state.codes.to(torch.uint8)
    groups = order[::group_size] // group_size
    scales, zeros = torch.empty_like(state.scales), torch.empty_like(state.zeros)
    scales[groups], zeros[groups] = state.scales, state.zeros
    return Rounded(
        codes.t().contiguous(), scales.t().contiguous(), zeros.t().contiguous().short(), loss
    )
