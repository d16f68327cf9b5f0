"""What humming-kernels checks before a launch, in Python and on the host; nothing is compiled.

Source: humming-kernels 0.1.12, `HummingKernel.init_kernel` (humming/kernel/humming.py:116), whose
own checks run here, and csrc/launcher/tensor.h.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

# what `install` replaced
STOCK: dict[str, Any] = {}


def gemm(
    *,
    layer_config: str,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    compute_config: str,
    bias: torch.Tensor | None = None,
    locks: torch.Tensor,
    **rest: Any,
) -> torch.Tensor:
    """Check what a launch is given against each kernel that humming would choose from."""
    from humming.kernel.humming import HummingKernel
    from humming.tune import get_heuristics_config

    from humming.config import LayerConfig  # isort: skip

    said = json.loads(layer_config)
    said.pop("sublayer_name", None)
    compute = json.loads(compute_config)
    config = LayerConfig(**said)
    choices = get_heuristics_config(config, **compute)
    # from none to all numbers of tokens
    assert choices[0][0] == 0
    assert all(after[0] == before[1] for before, after in itertools.pairwise(choices))
    for _, _, tuning in choices:
        own = {key: value for key, value in tuning.items() if key != "num_sms"}
        HummingKernel(**{**said, **compute, **own})
    assert not any(
        tensor is not None for tensor in rest.values() if isinstance(tensor, torch.Tensor)
    )
    N, K, dtype = config.shape_n, config.shape_k, config.param_dtype
    bits, group_size = config.b_dtype.num_bits, config.weight_scale_group_size
    _expect(inputs, dtype, inputs.shape[0], K - config.pad_shape_k)
    # 16 input features of 16 bits a tile
    _expect(weight, torch.int32, K // 16, N * 16 * bits // 32)
    _expect(weight_scale, dtype, K // group_size, N)
    assert config.has_bias == (bias is not None and said["has_bias"])
    if config.has_bias:
        assert bias is not None
        _expect(bias, dtype, N)
    _expect(locks, torch.int32, 1024)
    return inputs.new_empty((inputs.shape[0], N - config.pad_shape_n), dtype=dtype)


def _expect(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
    assert tensor.is_contiguous()


def install() -> None:
    """Keep humming from compiling, and from asking the driver."""
    from humming.jit.runtime import KernelRuntime
    from humming.utils import device

    STOCK["prepare"] = KernelRuntime.prepare
    KernelRuntime.prepare = lambda _kernel: None
    KernelRuntime.current_context = staticmethod(lambda: 0)
    # they decide for which numbers of tokens a kernel is chosen
    device.calculate_gpu_bandwidth = lambda *_: 1000.0
    device.estimate_tensorcore_max_tops = lambda *_: 300.0
