"""Launch options that a preset does not go with, whatever the model.

An option that changes how weights are read is honoured, or it is named here with the reason: none
is read and ignored. docs/launch.md says what becomes of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mixedprec_plugin.errors import Problem, UsageError
from mixedprec_plugin.experts.launch import Option, refused
from mixedprec_plugin.methods.interface import Device
from mixedprec_plugin.serving.settings import read_settings, split_extra_config

_OTHER_LOADER = "it belongs to another load format, which this one would not ask"
_MODELOPT = "ModelOpt quantizes a whole model in its own loader"
_PAST_THE_PLAN = "tensors that come past the plan are not quantized by the preset"
_OWN_READING = "the load format reads files by itself, and not through SGLang's readers"

_SHARED = "a preset gives shared experts methods of their own, and they are not fused"

_EVERYWHERE: tuple[Option, ...] = (
    ("quantization", (None,), "a preset names the method of each layer"),
    (
        "model_impl",
        (None, "auto", "sglang"),
        "a plan is made for SGLang's own models, whose layers are fused",
    ),
    (
        "startup_weight_load_mode",
        (None, "serial"),
        "SGLang overlaps loading with CUDA graphs in its default loader only",
    ),
    (
        "weight_cache_mode",
        (None, "off"),
        "the weight cache puts a load format of its own in this one's place",
    ),
    ("remote_instance_weight_loader_seed_instance_ip", (None,), _OTHER_LOADER),
    ("remote_instance_weight_loader_seed_instance_service_port", (None,), _OTHER_LOADER),
    ("remote_instance_weight_loader_send_weights_group_ports", (None, []), _OTHER_LOADER),
    ("remote_instance_weight_loader_backend", (None, "nccl"), _OTHER_LOADER),
    (
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
        (None, False),
        "an instance that copies these weights would have to know the plan",
    ),
    ("modelexpress_config", (None,), _OTHER_LOADER),
    ("rl_quant_profile", (None,), _OTHER_LOADER),
    ("modelopt_quant", (None,), _MODELOPT),
    ("modelopt_checkpoint_restore_path", (None,), _MODELOPT),
    ("modelopt_checkpoint_save_path", (None,), _MODELOPT),
    ("modelopt_export_path", (None,), _MODELOPT),
    ("quantize_and_serve", (None, False), _MODELOPT),
    ("custom_weight_loader", (None, []), _PAST_THE_PLAN),
    (
        "checkpoint_engine_wait_weights_before_ready",
        (None, False),
        f"the server would wait for ever: {_PAST_THE_PLAN}",
    ),
    ("enable_elastic_expert_backup", (None, False), _PAST_THE_PLAN),
    ("decrypted_config_file", (None,), "the plan is made from the checkpoint's own config.json"),
    ("enforce_shared_experts_fusion", (None, False), _SHARED),
    ("enable_waterfill", (None, False), _SHARED),
    (
        "offload_group_size",
        (None, -1, 0),
        "SGLang offloads groups of layers by the names of unquantized parameters",
    ),
)

_LORA_ON_CPU = "SGLang keeps adapters in pinned memory, which a machine without a GPU has not got"

_ON_CPU: tuple[Option, ...] = (
    ("enable_lora", (None, False), _LORA_ON_CPU),
    ("lora_paths", (None, [], {}), _LORA_ON_CPU),
    ("moe_runner_backend", (None, "auto"), "the CPU platform runs experts in a loop of its own"),
    (
        "speculative_algorithm",
        (None,),
        "SGLang's speculative decoding needs sgl-kernel, which does not load without a GPU",
    ),
    ("enable_eplb", (None, False), "SGLang measures and moves experts on GPUs"),
    ("enable_memory_saver", (None, False), "it frees the memory of a GPU"),
)


def why_not_options(args: Any, device: Device) -> list[Problem]:
    """Find the launch options that cannot be served with a preset.

    Args:
        args: SGLang's ServerArgs, or the namespace that they are made from; fields that it has not
            got are taken for their defaults.
    """
    table = _EVERYWHERE + (_ON_CPU if device == "cpu" else ())
    return [
        *_refused(args, table), *_extra_problems(args), *_override_problems(args),
        *_gathering_problems(args, device),
    ]  # fmt: skip


def _refused(args: Any, table: Iterable[Option]) -> Iterable[Problem]:
    for flag, what, remedy in refused(args, table):
        yield Problem(flag, what, remedy or f"start without {flag}", "launch")


def _extra_problems(args: Any) -> Iterable[Problem]:
    """SGLang's default loader takes keys for its readers, which do not read here."""
    _, rest = split_extra_config(getattr(args, "model_loader_extra_config", None))
    for key in rest:
        yield Problem(f"--model-loader-extra-config: {key}", _OWN_READING, "leave it out", "launch")


def _override_problems(args: Any) -> Iterable[Problem]:
    flag = "--json-model-override-args"
    text = getattr(args, "json_model_override_args", None) or "{}"
    try:
        overrides = json.loads(text)
    except ValueError as error:
        raise UsageError(Problem(flag, f"is not JSON ({error})")) from error
    if isinstance(overrides, Mapping) and "quantization_config" in overrides:
        what = "a preset names the method of each layer"
        yield Problem(f"{flag}: quantization_config", what, "leave it out", "launch")


_SEVERAL = "every rank of one replica must see the same tokens"
_MOVED = "experts that are moved are not told apart"

# what --mixedprec-inputs does not go with
_GATHERING: tuple[Option, ...] = (
    ("dp_size", (None, 1), _SEVERAL),
    ("attn_dp_size", (None, 1), _SEVERAL),
    ("enable_dp_attention", (None, False), _SEVERAL),
    ("attn_cp_size", (None, 1), _SEVERAL),
    ("enable_eplb", (None, False), _MOVED),
    ("ep_num_redundant_experts", (None, 0), _MOVED),
    ("init_expert_location", (None, "trivial"), _MOVED),
)
_HOOKS = "mixedprec"


def _gathering_problems(args: Any, device: Device) -> Iterable[Problem]:
    """What keeps the inputs of layers from being gathered, where that is asked for."""
    if not read_settings(args).inputs:
        return
    yield from _refused(args, _GATHERING)
    said = getattr(args, "cuda_graph_config", None)
    said = said.to_dict() if said is not None and not isinstance(said, Mapping) else said or {}
    is_eager = "disabled" in (
        said.get("prefill", {}).get("backend"),
        getattr(args, "cuda_graph_backend_prefill", None),
    )
    is_off = ("disable_prefill_cuda_graph", "disable_cuda_graph", "disable_piecewise_cuda_graph")
    if device == "cuda" and not is_eager and not any(getattr(args, x, False) for x in is_off):
        what = "prompts run in CUDA graphs, where no layer's inputs are seen"
        remedy = "add --cuda-graph-backend-prefill disabled"
        yield Problem("--mixedprec-inputs", what, remedy, "launch")


def ask_for_hooks(server_args: Any) -> None:
    """Have SGLang call `begin`, where the user asks for inputs.

    Args:
        server_args: ServerArgs, not resolved yet.
    """
    settings = read_settings(server_args)
    given = list(server_args.forward_hooks or ())
    if settings.inputs and all(spec.get("name") != _HOOKS for spec in given):
        # the model itself, which SGLang never calls by its __call__: only the factory is wanted
        spec = {
            "name": _HOOKS,
            "target_modules": [""],
            "hook_factory": "mixedprec_plugin.serving.gather:begin",
            "config": {"folder": settings.inputs, "num_tokens": settings.num_input_tokens},
        }
        server_args.forward_hooks = [*given, spec]
