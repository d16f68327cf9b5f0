"""Columns of a layer, made right behind a norm that is not its own source's."""

from __future__ import annotations

import torch

from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Rescale


def rescale_columns(
    weight: torch.Tensor, rescale: Rescale, target: Target, reader: Reader
) -> torch.Tensor:
    """Multiply column k by (own[k] + offset) / (served[k] + offset).

    The served norm counts as it is served, rounded to the model's dtype, so that W (own * x) is
    W' (served * x) but for one rounding of W' to float32.

    Args:
        weight: [N, K], floating point; not modified.
        rescale: the norm of the layer's source and the one that is served, [K] each.
        target: the model's dtype.
        reader: reads both norms.
    Returns:
        float32 [N, K].
    """
    own = reader.read(rescale.own).double() + rescale.offset
    served = reader.read(rescale.served).to(TORCH_DTYPES[target.dtype]).double() + rescale.offset
    # zero in both, as the plan made sure: such a feature is never seen
    ratio = torch.where(served == 0, 1.0, own / torch.where(served == 0, 1.0, served))
    return weight.float() * ratio.float()
