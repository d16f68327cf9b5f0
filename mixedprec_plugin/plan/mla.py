"""What multi-head latent attention (DeepSeek V2 and V3) cannot run.

Source: SGLang's models/deepseek_common/deepseek_weight_loader.py. `kv_b_proj` is absorbed into the
attention after loading: `post_load_weights` (:586) takes any `qweight` for AWQ's (:625), finds the
block size of INT8 in the config of the whole model (:728), and multiplies FP8 by CUDA kernels.
AWQ's kernel is wrapped by a module that is gone since SGLang 0.5.20 (utils.py:104,
`sglang.kernel_api_logging`), so that AWQ fails as well. `q_a_proj` and `kv_a_proj_with_mqa` become
one replicated layer with one input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mixedprec_plugin.methods.interface import Device
from mixedprec_plugin.methods.registry import AUTO, UNQUANTIZED
from mixedprec_plugin.plan.architecture import last_component
from mixedprec_plugin.plan.model import PlannedLayer

_FUSED = "fused_qkv_a_proj_with_mqa"
_ABSORBED = {
    "blockwise_int8": "SGLang looks for its block size in the config of a whole model",
    "gptq": "SGLang takes its packed weights for AWQ's",
    "awq": "SGLang imports sglang.kernel_api_logging for it, which it does not have since 0.5.20",
}
# of a layer under `auto`: what is stored as `weight` in floats or FP8
_ABSORBED_AS_STORED = ("float", "fp8")


def mla_faults(
    layer: PlannedLayer, shards: Sequence[PlannedLayer], device: Device
) -> Iterator[tuple[str, str]]:
    """Yield (text, remedy) for what keeps a projection of an MLA block from its scheme.

    Args:
        shards: all layers of the module that runs it.
    """
    scheme = layer.scheme
    if scheme is None or scheme.method == UNQUANTIZED:
        return
    if last_component(layer.name) == "kv_b_proj":
        reason = _ABSORBED.get(scheme.method, "")
        if (
            scheme.method == AUTO
            and layer.stored
            and layer.stored.encoding not in _ABSORBED_AS_STORED
        ):
            reason = f"SGLang absorbs floats and FP8, and it is {layer.stored.description}"
        if not reason and device == "cpu":
            reason = "the CPU platform absorbs it unquantized only"
        if reason:
            remedy = "give kv_b_proj the method bf16"
            if device == "cuda":
                remedy += ", fp8 or fp8_channel"
            yield f"kv_b_proj cannot be absorbed in {scheme.label}: {reason}", remedy
    if last_component(layer.module) != _FUSED:
        return
    if scheme.method == "fp8" and scheme.arguments["weight_block_size"] is None:
        yield (
            f"q_a_proj and kv_a_proj_with_mqa are one layer in SGLang, and {scheme.label} has one "
            "scale for each of them (expected one scale a layer)",
            "use method: fp8_block or fp8_channel",
        )
    if scheme.method == "gptq":
        yield (
            f"q_a_proj and kv_a_proj_with_mqa cannot run in {scheme.label}: SGLang looks at the "
            "dtype of their weight, and GPTQ has none (models/deepseek_v2.py, is_packed_weight)",
            "use method: fp8_block or awq",
        )
    if scheme.arguments.get("desc_act") and len(shards) > 1:
        yield (
            "q_a_proj and kv_a_proj_with_mqa are one layer in SGLang, and each has an act order of "
            "its own",
            "take a source without act order, or write method: bf16",
        )
