"""GPUs by name, and what of the methods each of them cannot run.

Line numbers are SGLang 0.5.23's, below sglang/srt.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.methods.marlin import fp8_marlin_faults
from mixedprec_plugin.methods.partitions import split_faults
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.methods.spec import Arguments, LayerShape

# model_runner_components/load_model_utils.py:91
LEAST_CAPABILITY = 75
_BF16_CAPABILITY = 80
# e4m3 arithmetic; below it `can_auto_enable_marlin_fp8` (fp8_utils.py:2794) is true from 80 on
_FP8_CAPABILITY = 89

# name -> compute capability, and memory in GB; of several sizes the usual one first. Source:
# NVIDIA, "CUDA GPU Compute Capability", and the products' data sheets.
_KNOWN: Mapping[str, tuple[int, tuple[int, ...]]] = MappingProxyType(
    {
        "V100": (70, (32, 16)),
        "T4": (75, (16,)),
        "RTX 2080": (75, (8,)),
        "RTX 2080 Ti": (75, (11,)),
        "Titan RTX": (75, (24,)),
        "RTX 6000": (75, (24,)),
        "RTX 8000": (75, (48,)),
        "A30": (80, (24,)),
        "A100": (80, (80, 40)),
        "A800": (80, (80, 40)),
        "A10": (86, (24,)),
        "A10G": (86, (24,)),
        "A16": (86, (16,)),
        "A40": (86, (48,)),
        "RTX 3060": (86, (12, 8)),
        "RTX 3080": (86, (10, 12)),
        "RTX 3090": (86, (24,)),
        "RTX 3090 Ti": (86, (24,)),
        "RTX A4000": (86, (16,)),
        "RTX A5000": (86, (24,)),
        "RTX A6000": (86, (48,)),
        "L4": (89, (24,)),
        "L20": (89, (48,)),
        "L40": (89, (48,)),
        "L40S": (89, (48,)),
        "RTX 4060 Ti": (89, (16, 8)),
        "RTX 4070": (89, (12,)),
        "RTX 4080": (89, (16,)),
        "RTX 4090": (89, (24,)),
        "RTX 4000 Ada": (89, (20,)),
        "RTX 5000 Ada": (89, (32,)),
        "RTX 6000 Ada": (89, (48,)),
        "H20": (90, (96, 141)),
        "H100": (90, (80, 94)),
        "H100 NVL": (90, (94,)),
        "H200": (90, (141,)),
        "H800": (90, (80,)),
        "GH200": (90, (96, 144)),
        "B200": (100, (180, 192)),
        "GB200": (100, (186, 192)),
        "B300": (103, (288, 270)),
        "GB300": (103, (288, 279)),
        "RTX 5070 Ti": (120, (16,)),
        "RTX 5080": (120, (16,)),
        "RTX 5090": (120, (32,)),
        "RTX PRO 6000": (120, (96,)),
        "GB10": (121, (128,)),
    }
)
# what drivers and sellers put around a name
_DECORATION = re.compile(
    r"\b(?:nvidia|geforce|tesla|quadro|generation|blackwell|hopper|server|workstation|edition"
    r"|max-q|pcie|sxm\d?|hbm\d?e?|gpu|dgx|spark)\b"
)
_SIZE = re.compile(r"\b(\d+) ?gi?b\b")
# what serves instead of a method, the nearest in size first
_INSTEAD: Mapping[str, tuple[str, ...]] = {
    "fp8": ("blockwise_int8", "gptq", "awq"),
    "fp8_channel": ("fp8", "blockwise_int8", "gptq", "awq"),
    "blockwise_int8": ("fp8", "gptq", "awq"),
    "gptq": ("awq", "fp8"),
    "awq": ("gptq", "blockwise_int8", "fp8"),
}
_NUMBER = re.compile(r"(?:sm_?(\d+)(\d)a?|(\d+)\.(\d))")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU to plan for.

    Attributes:
        name: as in the table; "compute capability 9.0" if only that is known.
        capability: compute capability, major * 10 + minor.
        memory_bytes: device memory by the data sheet's decimal GB, which is a little less than the
            driver reports; 0 if unknown.
    """

    name: str
    capability: int
    memory_bytes: int = 0


def find_gpu(text: str) -> Gpu:
    """Find a GPU by its name or its compute capability.

    Args:
        text: `H100`, `rtx 4090`, `4090`, `A100-SXM4-40GB`, `NVIDIA H100 80GB HBM3`, `9.0`,
            `sm_90`.
    Raises:
        UsageError: it is none that is known, it has no such memory, or SGLang does not run on it.
    """
    if number := _NUMBER.fullmatch(text.strip().lower()):
        major, minor = number.group(1) or number.group(3), number.group(2) or number.group(4)
        gpu = Gpu(f"compute capability {major}.{minor}", int(major) * 10 + int(minor))
    else:
        gpu = _by_name(text)
    if gpu.capability < LEAST_CAPABILITY:
        what = f"SGLang does not run on {gpu.name} (expected compute capability 7.5 or more)"
        raise UsageError(Problem("--gpu", what, rule="gpu"))
    return gpu


def _by_name(text: str) -> Gpu:
    plain = text.lower().replace("-", " ").replace("_", " ")
    size = _SIZE.search(plain)
    wanted = _key(_SIZE.sub(" ", plain))
    by_key = {_key(name): name for name in _KNOWN}
    name = by_key.get(wanted) or by_key.get(f"rtx{wanted}")
    if name is None:
        near = [by_key[key] for key in difflib.get_close_matches(wanted, by_key)]
        remedy = f"did you mean {' or '.join(near)}? " if near else ""
        what = f"{text!r} is not known (expected a name such as H100, or a compute capability)"
        remedy += "a compute capability such as 9.0 serves for any GPU"
        raise UsageError(Problem("--gpu", what, remedy, "gpu"))
    capability, sizes = _KNOWN[name]
    gigabytes = int(size[1]) if size else sizes[0]
    if gigabytes not in sizes:
        listed = ", ".join(f"{known} GB" for known in sizes)
        raise UsageError(Problem("--gpu", f"{name} has no {gigabytes} GB (expected {listed})"))
    return Gpu(name, capability, gigabytes * 10**9)


def _key(name: str) -> str:
    return re.sub(r"[\s]+", "", _DECORATION.sub(" ", name.lower()))


def served_dtype(dtype: str, capability: int) -> str:
    """Return the dtype that SGLang runs a model in on a GPU: float16 where there is no bfloat16.

    Args:
        dtype: what would run elsewhere, `BF16` or `F16`.
        capability: major * 10 + minor.
    Source: `maybe_downgrade_dtype_for_legacy_gpu`
        (model_executor/model_runner_components/load_model_utils.py:80).
    """
    return "F16" if capability < _BF16_CAPABILITY else dtype


def why_not_on_card(
    method: str,
    arguments: Arguments,
    shape: LayerShape,
    capability: int,
) -> tuple[tuple[str, str], ...]:
    """Return what keeps a GPU from running a layer, beside what `check_shape` refuses on every GPU.

    Args:
        method: canonical name of a method.
        arguments: all its arguments, as `registry.bind` returns them.
        shape: a linear layer's or an expert's; its dtype is what the model runs in, see
            `served_dtype`.
        capability: compute capability, major * 10 + minor.
    Returns:
        (text, remedy) for each reason; empty if the GPU runs it.
    """
    texts = _texts(method, arguments, shape, capability)
    if not texts:
        return ()
    remedy = _remedy(method, arguments, shape, capability)
    return tuple((text, remedy) for text in texts)


def _texts(method: str, arguments: Arguments, shape: LayerShape, capability: int) -> list[str]:
    spec = METHODS[method]
    if not spec.config_classes or split_faults(shape):
        return []
    if capability < spec.min_capability:
        return [
            f"{method} does not run on this GPU, whose compute capability is "
            f"{version(capability)} (expected {version(spec.min_capability)} or more)"
        ]
    if method == "awq" and capability < spec.fallback_below:
        return _plain_awq(arguments, shape, capability)
    if method == "fp8" and capability < _FP8_CAPABILITY:
        return _fp8_without_units(shape, capability)
    return []


def _plain_awq(arguments: Arguments, shape: LayerShape, capability: int) -> list[str]:
    """AWQ without Marlin (marlin_utils.py:83): `AWQConfig`, by methods/construct.py."""
    marlin = (
        "runs in Marlin kernels, and the GPU's compute capability is "
        f"{version(capability)} (expected 8.0 or more)"
    )
    found = []
    if shape.is_expert:
        # awq/awq.py:139 has no method for FusedMoE, and leaves its experts unquantized
        found.append(f"awq for experts {marlin}")
    if shape.dtype != "F16":
        # awq/awq.py:105
        found.append("awq does not run in bfloat16 on this GPU (expected float16)")
    if arguments["group_size"] == -1:
        # awq/schemes/awq_linear.py:69 divides by the group size
        found.append(f"awq with group_size -1 {marlin}")
    return found


def _fp8_without_units(shape: LayerShape, capability: int) -> list[str]:
    if shape.is_expert:
        # fp8.py:2221: Marlin only where --moe-runner-backend asks for it
        return [
            "fp8 for experts runs in a Triton kernel with FP8 arithmetic, and the GPU's compute "
            f"capability is {version(capability)} (expected 8.9 or more)"
        ]
    return fp8_marlin_faults(shape)


def _remedy(method: str, arguments: Arguments, shape: LayerShape, capability: int) -> str:
    """What the GPU does run: tried, not guessed; the nearest in size first."""

    def runs(name: str, settings: Arguments, tried: LayerShape) -> bool:
        return not METHODS[name].check_shape(settings, tried, "cuda") and not _texts(
            name, settings, tried, capability
        )

    if runs(method, arguments, dataclasses.replace(shape, dtype="F16")):
        return "start with --dtype float16"
    if "group_size" in arguments and runs(method, {**arguments, "group_size": 128}, shape):
        return "use group_size: 128"
    ways = [name for name in _INSTEAD.get(method, ()) if runs(name, METHODS[name].defaults, shape)]
    return f"use method: {' or '.join((*ways, 'unquantized'))}"


def version(capability: int) -> str:
    """89 -> "8.9"."""
    return f"{capability // 10}.{capability % 10}"
