"""What linear methods with packed weights share: loading again, and the layout that replaces."""

from __future__ import annotations

from sglang.srt.layers.linear import LinearBase

from mixedprec_plugin.cpu.heap import trim_heap
from mixedprec_plugin.cpu.int4 import Int4Weight
from mixedprec_plugin.cpu.int8 import Int8Weight


class ReloadableMethod:
    """Makes a linear method of SGLang's that runs a scheme one that can be loaded again."""

    def restore_weights_before_loading(self, layer: LinearBase) -> None:
        """Give the parameters the checkpoint's layout again; their values stay."""
        layer.scheme.restore_weights_before_loading(layer)


def replace_weight(layer: LinearBase, weight: Int4Weight | Int8Weight | None) -> None:
    """Put a packed weight's tensors in the place of the checkpoint's; None leaves those.

    Called when what the weight was made of is no longer in use: free memory is given back.
    """
    if weight is not None:
        layer.qweight.data = weight.packed
        layer.scales.data = weight.scales
    trim_heap()
