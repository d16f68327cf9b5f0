"""A plan held against its model's family: what SGLang's class of it cannot load or run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from mixedprec_plugin.checkpoint.source import Source
from mixedprec_plugin.errors import Problem
from mixedprec_plugin.families.config import Config, architecture, sizes
from mixedprec_plugin.families.names import NEVER_QUANTIZED, last_component
from mixedprec_plugin.families.table import family_of
from mixedprec_plugin.methods.cards import version
from mixedprec_plugin.methods.interface import Device, Fault, Target
from mixedprec_plugin.methods.registry import AUTO, METHODS
from mixedprec_plugin.methods.stored import TensorSpec
from mixedprec_plugin.plan.folding import fold_names, fold_problems
from mixedprec_plugin.plan.model import Plan, PlannedLayer

# SGLang's own kernel for tokens that are routed by groups of experts (environ.py:1485)
_TRITON_ROUTING = "SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK"
_KINDS = {
    "BF16": "floats", "F16": "floats", "F32": "floats", "F8_E4M3": "FP8", "F8_E5M2": "FP8",
    "I8": "INT8",
}  # fmt: skip
_NOT_ABSORBED = {
    "INT8": "SGLang looks for its block size in the config of a whole model",
    "GPTQ": "SGLang takes its packed weights for AWQ's",
    "AWQ": "SGLang imports sglang.kernel_api_logging for it, which it does not have since 0.5.20",
}
# of layers that are stored fused; `qkv` is of vision towers, whose heads are all alike
_EQUAL_SHARDS = {"gate_up_proj": ("gate", "up"), "qkv": tuple("qkv"), "in_proj_ba": ("0", "1")}
# where, what, remedy
_Found = tuple[str, str, str]


def why_not_family(
    config: Config, target: Target, layers: Sequence[PlannedLayer] = ()
) -> list[Problem]:
    """List what keeps SGLang from loading or running the model of a config.json at all."""
    found = (
        *_routing_problems(config, target),
        *_layer_problems(config, layers),
        *_head_problems(config, target.tp_size),
    )
    return fold_problems(Problem(*problem, "family") for problem in found)


def _layer_problems(config: Config, layers: Sequence[PlannedLayer]) -> Iterator[_Found]:
    name, family = architecture(config), family_of(config)
    fp8 = " or ".join(_methods("FP8"))
    for layer in layers:
        kind = _storage(layer.outputs)
        for end, reader in family.dtype_readers.items():
            if layer.module.endswith(end) and not _is_readable(layer):
                text = f"SGLang's {reader} looks at the dtype of their weight, and {kind} has none"
                yield layer.name, text, _instead_of_packed()
        is_asked = last_component(layer.module) in family.asked_for_weight
        if is_asked and kind not in ("floats", "FP8", "INT8"):
            text = f"SGLang's {name} fills it from one tensor `weight`, and cannot in"
            yield layer.name, f"{text} {layer.method}", f"use method: {fp8}"
    for pattern, remedy in family.not_loaded.items():
        if names := [layer.name for layer in layers if re.match(pattern, layer.name)]:
            text = f"SGLang's {name} does not load tensors that are called so"
            yield ", ".join(fold_names(names)[:3]), text, f"{remedy} in the checkpoint"


def _head_problems(config: Config, tp_size: int) -> Iterator[_Found]:
    name = architecture(config)
    num_heads = config.get("num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if not family_of(config).has_joint_head_norms:
        return
    if tp_size > 1:
        text = (
            f"SGLang's {name} normalizes the heads of q and k together, and does not on {tp_size} "
            "tensor-parallel ranks"
        )
        yield name, text, "serve it on one, or on more with --dp"
    if num_heads != num_kv_heads:
        text = (
            f"it has {num_kv_heads} key-value heads, and SGLang's class a norm of k for "
            f"{num_heads} (num_key_value_heads in config.json)"
        )
        yield name, text, "SGLang cannot serve it"


def _routing_problems(config: Config, target: Target) -> Iterator[_Found]:
    """DeepSeek-V3's routing, for which SGLang takes FlashInfer's kernel and does not ask the GPU.

    Without groups it takes another: a token would need to go to one expert.

    Source: `biased_grouped_topk_gpu` (layers/moe/topk.py:2021) of SGLang 0.5.23;
    FlashInfer's fused_moe/fused_routing_dsv3.py:66.
    """
    num_experts, top_k = config.get("n_routed_experts") or 0, config.get("num_experts_per_tok") or 0
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    is_biased = config.get("topk_method") == "noaux_tc" or family_of(config).has_biased_router
    in_group = num_experts // groups
    is_flashinfers = (
        is_biased and groups > 1 and num_experts and config.get("norm_topk_prob", True)
        and in_group <= 32 and in_group * chosen <= 128 and not num_experts & (num_experts - 1)
        and top_k <= min(8, chosen * groups)
    )  # fmt: skip
    is_off = os.environ.get(_TRITON_ROUTING, "").lower() in ("1", "true", "t", "yes", "y", "on")
    if target.gpu is None or target.gpu.capability >= 89 or is_off or not is_flashinfers:
        return
    text = (
        "SGLang routes its tokens with a kernel of FlashInfer's that GPUs of compute capability "
        f"{version(target.gpu.capability)} do not have (expected 8.9 or more)"
    )
    yield architecture(config), text, f"set {_TRITON_ROUTING}=1 in the environment of the server"


def mla_faults(
    layer: PlannedLayer, shards: Sequence[PlannedLayer], device: Device, config: Config
) -> Iterator[Fault]:
    """Yield what keeps a projection of latent attention from its scheme.

    Source: SGLang's models/deepseek_common/deepseek_weight_loader.py. `kv_b_proj` is absorbed into
    the attention after loading: `post_load_weights` (:586) takes any `qweight` for AWQ's (:625),
    finds the block size of INT8 in the config of the whole model (:728), and multiplies FP8 by CUDA
    kernels. AWQ's kernel is wrapped by a module that is gone since SGLang 0.5.20 (utils.py:104,
    `sglang.kernel_api_logging`), so that AWQ fails as well. `q_a_proj` and `kv_a_proj_with_mqa`
    become one replicated layer with one input.

    Args:
        shards: all layers of the module that runs it.
    """
    scheme, family, kind = layer.scheme, family_of(config), _storage(layer.outputs)
    if scheme is None or kind == "floats":
        return
    if last_component(layer.name) == family.absorbed and (reason := _not_absorbed(layer, device)):
        can = _methods("floats", *(("FP8", "FP8 tensor") if device == "cuda" else ()))
        named = " or ".join(filter(None, (", ".join(can[:-1]), can[-1])))
        text = f"{family.absorbed} cannot be absorbed in {scheme.label}: {reason}"
        yield Fault("mla", text, f"give {family.absorbed} the method {named}")
    if last_component(layer.module) != family.latent_inputs or scheme.method == AUTO:
        return
    both = " and ".join(family.fused_modules[family.latent_inputs])
    if not _is_readable(layer):
        text = (
            f"{both} cannot run in {scheme.label}: SGLang looks at the dtype of their weight, and "
            f"{kind} has none (models/deepseek_v2.py, is_packed_weight)"
        )
        yield Fault("mla", text, _instead_of_packed())
    if scheme.arguments.get("desc_act") and len(shards) > 1:
        text = f"{both} are one layer in SGLang, and each has an act order of its own"
        remedy = f"take a source without act order, or write method: {_methods('floats')[0]}"
        yield Fault("mla", text, remedy)


def _not_absorbed(layer: PlannedLayer, device: Device) -> str:
    kind = _storage(layer.outputs)
    if kind.startswith("FP8"):
        return "the CPU platform absorbs it unquantized only" if device == "cpu" else ""
    if kind in _NOT_ABSORBED and layer.method != AUTO:
        return _NOT_ABSORBED[kind]
    named = layer.stored.description if layer.stored and layer.method == AUTO else ""
    return f"SGLang absorbs floats and FP8, and it is {named or ' and '.join(layer.outputs)}"


def _storage(tensors: Mapping[str, TensorSpec]) -> str:
    """What SGLang's models tell apart of a weight: dtype, one scale a layer, how it is packed."""
    if "weight" not in tensors:
        packing = "GPTQ" if "g_idx" in tensors else "AWQ"
        return packing if "qweight" in tensors else "its packing"
    kind = _KINDS.get(tensors["weight"].dtype, tensors["weight"].dtype)
    has_one_scale = "weight_scale" in tensors and not tensors["weight_scale"].shape
    return "FP8 tensor" if kind == "FP8" and has_one_scale else kind


def _is_readable(layer: PlannedLayer) -> bool:
    """Whether SGLang's models may look at the dtype of its weight; they know AWQ's to have none."""
    is_known = "weight" in layer.outputs or _storage(layer.outputs) == "AWQ"
    return is_known or layer.scheme is None or layer.method == AUTO


def _instead_of_packed() -> str:
    return f"use method: {_methods('FP8')[0]} or {_methods('AWQ')[0]}"


def _methods(*kinds: str) -> list[str]:
    """Names of the methods that store a weight so, as `_storage` tells it; the first of each."""
    found: dict[str, str] = {}
    for method, spec in METHODS.items():
        for name, implied in {method: {}, **spec.aliases}.items():
            tensors = spec.stored({**spec.defaults, **implied}, 4096, 4096, "BF16")
            if _storage(tensors) in kinds:
                found.setdefault(method, name)
    return list(found.values())


def shared_experts_line(plan: Plan) -> str:
    """Say so where SGLang would run shared experts as one more routed one if there were no preset.

    With a preset they are layers of their own on every GPU, and follow their own rules. The same
    weights are read and multiplied; a layer launches three kernels more (two products, an
    activation), on a second stream beside the routed experts (models/deepseek_v2.py:867).
    """
    config = plan.source.config
    if config.get("n_shared_experts") != 1 or not family_of(config).fuses_shared_experts(config):
        return ""
    own = [x for x in plan.layers if ".mlp.shared_experts." in x.name and x.kind != "draft"]
    where = ", ".join(fold_names(dict.fromkeys(layer.module for layer in own)))
    return f"{where}: not fused into the routed experts, they follow their own rules" if own else ""


def check_config_shapes(layers: Sequence[PlannedLayer], source: Source) -> list[Problem]:
    """Hold stored shapes against config.json, for families whose shapes it spells out."""
    family, said = family_of(source.config), sizes(source.config)
    heads = ("num_attention_heads", "num_key_value_heads")
    if {*heads, "head_dim"} <= said.keys():
        said |= {f"{key} * head_dim": said[key] * said["head_dim"] for key in heads}
    problems = []
    for layer in layers:
        last, weight, stored = last_component(layer.name), layer.inputs.get("weight"), layer.stored
        got = weight.shape if weight is not None else None
        if layer.kind not in NEVER_QUANTIZED:
            got = (stored.N, stored.K) if stored is not None and stored.method else None
        if got is None or not said.keys() >= set(family.shapes.get(last, ("",))):
            continue
        want = tuple([said[key] for key in family.shapes[last]])
        if got != want:
            text = f"its weight is {list(got)} (expected {list(want)} by config.json)"
            remedy = "config.json and weights are of different models, or a file is damaged"
            problems.append(Problem(layer.name, text, remedy, "config-shape"))
    return fold_problems(problems)


def stored_shards(layer: PlannedLayer, config: Config) -> tuple[tuple[str, int], ...]:
    """Return (shard id, output features) of a layer that is stored fused, as Phi-3's are, or of a
    shard that is, as Qwen3.5's in_proj_qkv.

    SGLang splits them by its own sizes when it loads them (`_load_fused_module_from_checkpoint`,
    layers/linear.py:897, 1197), so that shape rules hold for each shard.
    """
    is_one = layer.shard is None or isinstance(layer.shard, tuple)
    if layer.kind != "linear" or not is_one or layer.stored is None:
        return ()
    last, N = last_component(layer.name), layer.stored.N
    if alike := _EQUAL_SHARDS.get(last):
        return tuple((shard, N // len(alike)) for shard in alike)
    said = sizes(config)
    if last in ("in_proj_qkv", "in_proj_qkvz"):
        key, value = (
            said.get(f"linear_num_{part}_heads", 0) * said.get(f"linear_{part}_head_dim", 0)
            for part in ("key", "value")
        )
        return tuple(zip("0123", (key, key, value, *[value] * last.endswith("z")), strict=False))
    if last != "qkv_proj":
        return ()
    num_heads, head = said.get("num_attention_heads", 0), said.get("head_dim", 0)
    kv = said.get("num_key_value_heads", num_heads) * head
    return (("q", num_heads * head), ("k", kv), ("v", kv))


def why_not_stored_fused(layer: PlannedLayer, config: Config) -> str:
    """Return why a layer that is stored fused cannot be split; empty if it can, or is not."""
    sizes_of = dict(stored_shards(layer, config))
    expected = sum(sizes_of.values())
    if not sizes_of or layer.stored is None or expected == layer.stored.N:
        return ""
    parts = " + ".join(map(str, sizes_of.values()))
    return (
        f"is stored fused with {layer.stored.N} rows (expected {parts} = {expected} for "
        f"{', '.join(sizes_of)} by config.json)"
    )
