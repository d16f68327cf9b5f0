"""What runs a layer on a GPU: SGLang's class and the kernel, as the dry run saw them."""

from __future__ import annotations

from mixedprec_plugin.methods.interface import Arguments, LayerShape, Target
from mixedprec_plugin.methods.registry import METHODS

_OF_EXPERTS = {"triton": "fused_moe_kernel", "marlin": "Marlin", "": ""}


def config_class(method: str, target: Target) -> str:
    """Name SGLang's config class of a method, `module:Class`; empty for its unquantized methods."""
    spec, capability = METHODS[method], target.gpu.capability if target.gpu else None
    return spec.config_classes.get(spec.config_key(target.device, capability), "")


def kernel(method: str, arguments: Arguments, shape: LayerShape, target: Target) -> str:
    """Name the kernel that a layer without faults runs in, in the words of docs/cuda.md.

    Returns:
        empty where no GPU is named, or the kernel is SGLang's choice.
    """
    if target.device != "cuda" or target.gpu is None:
        return ""
    spec = METHODS[method]
    if shape.is_expert:
        return _OF_EXPERTS[spec.moe_kernels]
    return spec.kernel(arguments, shape, target.gpu.capability)
