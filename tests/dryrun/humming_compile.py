"""humming's kernels, compiled by NVRTC for a card that is played, and not launched.

python -m tests.dryrun.humming_compile "H100" FOLDER
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.dryrun import humming_checks
from tests.dryrun.cards import Card
from tests.dryrun.process import run_on_card

# codes that lie in two words, and those that are prepared for bfloat16
BITS = (3, 8)
# padded along both
SHAPE = {"shape_n": 768, "shape_k": 640, "pad_shape_n": 192, "pad_shape_k": 64}


def compile_all(card: Card, folder: Path) -> dict[str, str]:
    """Compile what repacks a weight, and the kernel for few tokens.

    Returns:
        name of the kernel and bits -> the compiled file.
    """
    os.environ["HUMMING_CACHE_DIR"] = str(folder / "humming")
    from humming.jit.runtime import KernelRuntime
    from humming.kernel.humming import HummingKernel
    from humming.kernel.repack_weight import RepackWeightKernel

    from mixedprec_plugin.methods.humming.sglang import find_compiler

    KernelRuntime.prepare = humming_checks.STOCK["prepare"]
    KernelRuntime.load_cubin = HummingKernel.load_cubin = lambda _kernel: None
    find_compiler()
    made = {}
    for bits in BITS:
        kernels: list[Any] = [
            RepackWeightKernel(
                weight_bits=bits,
                activation_bits=16,
                is_weight_packed=True,
                use_wgmma=card.architecture == 90,
                # humming/transform.py, `transform_humming_weight`
                should_preprocess_for_int2fp=bits == 8 and card.dtype == "bfloat16",
            ),
            HummingKernel(**tuned(card, bits)),
        ]
        for kernel in kernels:
            made[f"{kernel.name} {bits}"] = kernel.kernel_filename
    return made


def tuned(card: Card, bits: int) -> dict[str, Any]:
    """The arguments of the kernel that humming would choose for one token."""
    from humming.tune import get_heuristics_config

    from humming.config import LayerConfig  # isort: skip

    layer = {
        **dict.fromkeys(("a_dtype", "bs_dtype", "c_dtype"), card.dtype),
        "b_dtype": f"uint{bits}",
        "weight_scale_group_size": 64,
        **SHAPE,
    }
    compute = {"gemm_type": "dense", "use_f16_accum": False}
    _, _, tuning = get_heuristics_config(LayerConfig(**layer), **compute)[0]
    return {**layer, **compute, **{k: v for k, v in tuning.items() if k != "num_sms"}}


if __name__ == "__main__":
    run_on_card(compile_all)
