"""GPUs by name. Line numbers are SGLang 0.5.23's, below sglang/srt."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping

from mixedprec_plugin.errors import Problem, UsageError

# model_runner_components/load_model_utils.py:91
LEAST_CAPABILITY = 75
_BF16_CAPABILITY = 80

# compute capability -> names and memory in GB; of several sizes the usual one first. Source:
# NVIDIA, "CUDA GPU Compute Capability", and the products' data sheets.
_BY_CAPABILITY = {
    70: "V100 32/16",
    75: "T4 16, RTX 2080 8, RTX 2080 Ti 11, Titan RTX 24, RTX 6000 24, RTX 8000 48",
    80: "A30 24, A100 80/40, A800 80/40",
    86: "A10 24, A10G 24, A16 16, A40 48, RTX 3060 12/8, RTX 3080 10/12, RTX 3090 24, "
    "RTX 3090 Ti 24, RTX A4000 16, RTX A5000 24, RTX A6000 48",
    89: "L4 24, L20 48, L40 48, L40S 48, RTX 4060 Ti 16/8, RTX 4070 12, RTX 4080 16, RTX 4090 24, "
    "RTX 4000 Ada 20, RTX 5000 Ada 32, RTX 6000 Ada 48",
    90: "H20 96/141, H100 80/94, H100 NVL 94, H200 141, H800 80, GH200 96/144",
    100: "B200 180/192, GB200 186/192",
    103: "B300 288/270, GB300 288/279",
    120: "RTX 5070 Ti 16, RTX 5080 16, RTX 5090 32, RTX PRO 6000 96",
    121: "GB10 128",
}
# memory bandwidth in GB/s, by the products' data sheets; of several versions the fastest
_BANDWIDTH = {
    "T4": 320, "RTX 2080 Ti": 616, "A10": 600, "A10G": 600, "A30": 933, "A40": 696, "A100": 2039,
    "A800": 2039, "RTX 3090": 936, "RTX 3090 Ti": 1008, "RTX A6000": 768, "L4": 300, "L40": 864,
    "L40S": 864, "RTX 4080": 717, "RTX 4090": 1008, "RTX 6000 Ada": 960, "H100": 3352,
    "H200": 4800, "B200": 8000, "RTX 5090": 1792, "RTX PRO 6000": 1792,
}  # fmt: skip
# of the GPUs that SGLang runs on, ascending
CAPABILITIES = tuple(sorted(x for x in _BY_CAPABILITY if x >= LEAST_CAPABILITY))
# what drivers and sellers put around a name
_DECORATION = re.compile(
    r"\b(?:nvidia|geforce|tesla|quadro|generation|blackwell|hopper|server|workstation|edition"
    r"|max-q|pcie|sxm\d?|hbm\d?e?|gpu|dgx|spark)\b"
)
# AMD's, Apple's and Intel's
_FOREIGN = re.compile(r"amd|radeon|instinct|mi\d|(?:rx|w)\d{4}|apple|m[1-5](?!\d)|intel|arc|gaudi")
_SIZE = re.compile(r"\b(\d+) ?gi?b\b")
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


def bandwidth_of(gpu: Gpu) -> int:
    """Bytes a second that a GPU reads of its memory; 0 where that is not known."""
    return _BANDWIDTH.get(gpu.name, 0) * 10**9


def _by_name(text: str) -> Gpu:
    plain = text.lower().replace("-", " ").replace("_", " ")
    size = _SIZE.search(plain)
    wanted = _key(_SIZE.sub(" ", plain))
    known = _known()
    by_key = {_key(name): name for name in known}
    name = by_key.get(wanted) or by_key.get(f"rtx{wanted}")
    if name is None:
        raise UsageError(_unknown(text, wanted, by_key))
    capability, sizes = known[name]
    gigabytes = int(size[1]) if size else sizes[0]
    if gigabytes not in sizes:
        listed = ", ".join(f"{one} GB" for one in sizes)
        raise UsageError(Problem("--gpu", f"{name} has no {gigabytes} GB (expected {listed})"))
    return Gpu(name, capability, gigabytes * 10**9)


def _unknown(text: str, wanted: str, by_key: Mapping[str, str]) -> Problem:
    """What was meant has the same number, or all but the same name: an RTX 8900 is no RTX 4090."""
    if _FOREIGN.match(wanted):
        what = f"{text!r} is no NVIDIA GPU (expected one, or --device cpu)"
        return Problem("--gpu", what, "plans are for SGLang's CUDA kernels", "gpu")
    numbers = re.findall(r"\d+", wanted)
    alike = [key for key in by_key if numbers and re.findall(r"\d+", key) == numbers]
    near = [by_key[key] for key in difflib.get_close_matches(wanted, alike)]
    near = near or [by_key[key] for key in difflib.get_close_matches(wanted, by_key, 1, 0.85)]
    what = f"{text!r} is not known (expected {', '.join(by_key.values())}, or as 8.9 or sm_89)"
    remedy = f"did you mean {' or '.join(near)}?" if near else "give its compute capability"
    return Problem("--gpu", what, remedy, "gpu")


def _known() -> dict[str, tuple[int, list[int]]]:
    """Name -> compute capability, and sizes of memory in GB."""
    found = {}
    for capability, listed in _BY_CAPABILITY.items():
        for entry in listed.split(", "):
            name, sizes = entry.rsplit(" ", 1)
            found[name] = capability, [int(size) for size in sizes.split("/")]
    return found


def _key(name: str) -> str:
    return "".join(_DECORATION.sub(" ", name.lower()).split())


def served_dtype(dtype: str, capability: int) -> str:
    """Return the dtype that SGLang runs a model in on a GPU: float16 where there is no bfloat16.

    Source: `maybe_downgrade_dtype_for_legacy_gpu`
    (model_executor/model_runner_components/load_model_utils.py:80).
    """
    return "F16" if capability < _BF16_CAPABILITY else dtype


def version(capability: int) -> str:
    """89 -> "8.9"."""
    return f"{capability // 10}.{capability % 10}"


def to_dequantize(dtype: str) -> str:
    """What a rule says for a layer to be dequantized, where a model runs in a dtype."""
    return f"method: {'bf16' if dtype == 'BF16' else 'unquantized'}"
