"""Every place in SGLang that the plugin stands on, and the check that it stands there.

Line numbers are SGLang 0.5.23's, below sglang/srt. SGLang logs a plugin's exception and goes on,
and a hook that it cannot apply likewise; so `check_registration` comes before the load format gets
its loader.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sglang
from sglang.srt.arg_groups import choices
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from mixedprec_plugin.checkpoint.converted import is_converted
from mixedprec_plugin.cpu import hooks as on_cpu
from mixedprec_plugin.errors import MixedPrecisionError, Problem, RegistrationError
from mixedprec_plugin.serving.flags import LOAD_FORMAT, add_flags, exit_with, fold_flags


@dataclasses.dataclass(frozen=True)
class Hook:
    """One hook: its target, what runs there, and the SGLang lines it stands on."""

    target: str
    function: Callable[..., Any]
    stands_on: str
    kind: HookType = HookType.AROUND


def _add_cli_args(result: Any, parser: argparse.ArgumentParser) -> None:
    add_flags(parser)


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    from mixedprec_plugin.serving.early import check_early, check_not_converted
    from mixedprec_plugin.serving.planner import hand_over

    try:
        args = fold_flags(args)
        check_not_converted(args)
        check_early(args)
    except MixedPrecisionError as error:
        exit_with(error)
    server_args = original(cls, args)
    if server_args.load_format == LOAD_FORMAT:
        hand_over(args, server_args)
    return server_args


def _resolve_once(original: Callable[[Any], None], server_args: Any) -> None:
    was_resolved = getattr(server_args, "_resolution_finished", False)
    if server_args.load_format != LOAD_FORMAT or was_resolved:
        original(server_args)
        return
    from mixedprec_plugin.serving.early import set_kv_dtype
    from mixedprec_plugin.serving.late import keep_auto
    from mixedprec_plugin.serving.options import ask_for_hooks

    set_kv_dtype(server_args)
    ask_for_hooks(server_args)
    original(server_args)
    keep_auto(server_args)


def _verify_load_format(original: Callable[[Any], None], load_config: Any) -> None:
    if isinstance(load_config.load_format, str) and load_config.load_format.lower() == LOAD_FORMAT:
        require_registration()
        from mixedprec_plugin.serving.loader import MixedPrecisionLoader

        load_config.load_format = MixedPrecisionLoader
        return
    original(load_config)


# whether the model config that is being made is for our load format
_is_asked_for: contextvars.ContextVar[bool] = contextvars.ContextVar("mixedprec", default=False)


@contextlib.contextmanager
def asked_for() -> Iterator[None]:
    """While the model config that is made here is one of our load format."""
    token = _is_asked_for.set(True)
    try:
        yield
    finally:
        _is_asked_for.reset(token)


def _verify_quantization(original: Callable[[Any], None], model_config: Any) -> None:
    said = getattr(model_config.hf_config, "quantization_config", None)
    is_ours = isinstance(said, Mapping) and is_converted(said)
    # a draft model is served as SGLang serves it
    if _is_asked_for.get() and (is_ours or not model_config.is_draft_model):
        model_config.quantization = None
        return
    original(model_config)


def _model_config_from_server_args(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    from mixedprec_plugin.serving.early import check_early, check_not_converted

    if server_args.load_format != LOAD_FORMAT:
        check_not_converted(server_args)
        return original(server_args, *args, **kwargs)
    from mixedprec_plugin.serving.planner import hand_over

    check_early(server_args)
    with asked_for():
        model_config = original(server_args, *args, **kwargs)
    hand_over(server_args, model_config)
    if not model_config.is_draft_model:
        model_config.quantization = None
    return model_config


def _update_weights_from_disk(
    original: Callable[..., Any], updater: Any, model_path: str, load_format: str, **kwargs: Any
) -> Any:
    from mixedprec_plugin.serving.loader import is_mixed_precision

    if is_mixed_precision(updater.get_model()):
        load_format = LOAD_FORMAT
    elif updater.model_config.is_draft_model and load_format == LOAD_FORMAT:
        load_format = "auto"  # as the draft model was loaded
    return original(updater, model_path, load_format, **kwargs)


def _load_weights_direct(original: Callable[..., Any], model: Any, named_tensors: Any) -> Any:
    from mixedprec_plugin.serving.loader import is_mixed_precision

    if is_mixed_precision(model):
        return model.load_weights(named_tensors)  # which refuses, see close_to_unquantized
    return original(model, named_tensors)


def _read_adapter(original: Callable[[Any], None], adapter: Any) -> None:
    from mixedprec_plugin.serving.loader import MixedPrecisionLoader, without_settings

    if adapter.load_config.load_format is MixedPrecisionLoader:
        adapter.load_config = without_settings(adapter.load_config)
    original(adapter)


def _should_async_load(original: Callable[[Any], bool], weight: Any) -> bool:
    from mixedprec_plugin.serving.recorder import is_recording

    return False if is_recording() else original(weight)


def _before_listening(_: Any, server_args: Any = None) -> None:
    if server_args is not None and server_args.load_format == LOAD_FORMAT:
        from mixedprec_plugin.serving.live import tell

        try:
            tell(server_args)
        except MixedPrecisionError as error:
            exit_with(error)


HOOKS = (
    Hook(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        _add_cli_args,
        "server_args.py:351: the flags",
        HookType.AFTER,
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        _from_cli_args,
        "server_args.py:446: ServerArgs is sealed and knows only its own fields",
    ),
    Hook(
        "sglang.srt.server_args.ServerArgs.resolve_once",
        _resolve_once,
        "server_args.py:244, arg_groups/overrides.py:771: on Blackwell experts get a backend by "
        "the quantization of a whole model",
    ),
    Hook(
        "sglang.srt.configs.load_config.LoadConfig._verify_load_format",
        _verify_load_format,
        "configs/load_config.py:156, model_loader/loader.py:4170: a class may stand for a format",
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig.from_server_args",
        _model_config_from_server_args,
        "configs/model_config.py:2000: a checkpoint's own quantization is not the whole model's",
    ),
    Hook(
        "sglang.srt.configs.model_config.ModelConfig._verify_quantization",
        _verify_quantization,
        "configs/model_config.py:2000: what the checkpoint says of the whole model need be no "
        "method that SGLang runs: mixedprec, as those say that we converted, or gptq",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
        ".update_weights_from_disk",
        _update_weights_from_disk,
        "weight_updater.py:195: a load format of the request's own would lose the preset",
    ),
    Hook(
        "sglang.srt.model_loader.utils.should_async_load",
        _should_async_load,
        "model_loader/utils.py:295: what other threads write (DeepSeek's loader has them) is not "
        "seen by the proof that every parameter was filled",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner_components.weight_updater"
        "._model_load_weights_direct",
        _load_weights_direct,
        "weight_updater.py:438: the format direct of an update passes by load_weights",
    ),
    Hook(
        "sglang.srt.lora.lora.LoRAAdapter.initialize_weights",
        _read_adapter,
        "lora/lora.py:145: an adapter is read by the default loader with the model's load config, "
        "whose format and settings that loader refuses",
    ),
    Hook(
        "sglang.srt.utils.common.set_uvicorn_logging_configs",
        _before_listening,
        "entrypoints/http_server.py:2914: what SGLang calls when its app is whole and does not "
        "listen yet; http_server itself is imported by the one process that needs it",
        HookType.AFTER,
    ),
)


# on our CPU platform only, where SGLang has what they stand on
CPU_HOOKS = (
    Hook(
        "sglang.srt.layers.rotary_embedding.factory.get_rope_wrapper",
        on_cpu.get_rope_wrapper,
        "layers/rotary_embedding/factory.py:478: none of DeepSeek's without YaRN on a CPU",
    ),
    Hook(
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul",
        on_cpu.launch_fused_gate_sigmoid_mul,
        "models/qwen2_moe.py:877: the gate of a shared expert is a Triton kernel",
    ),
    Hook(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry"
        ".get_handler",
        on_cpu.get_attention_handler,
        "models/deepseek_common/attention_backend_handler.py:55: torch_native is taken for triton",
    ),
    Hook(
        "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments",
        on_cpu.handle_model_specific_adjustments,
        "arg_groups/model_hook.py:536: gpt-oss does not start on attention without sinks",
    ),
    Hook(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        on_cpu.attend,
        "layers/attention/torch_native_backend.py:279: takes no sinks",
    ),
    Hook(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_decode",
        on_cpu.attend,
        "layers/attention/torch_native_backend.py:338: takes no sinks",
    ),
)


def hooks_here() -> tuple[Hook, ...]:
    """The hooks of this process's platform."""
    from sglang.srt.platforms import current_platform

    if not (current_platform.device_type == "cpu" and current_platform.is_out_of_tree()):
        return HOOKS
    return HOOKS + tuple(hook for hook in CPU_HOOKS if _target(hook) is not None)


def register() -> None:
    """Register the load format and every hook; SGLang applies the hooks afterwards."""
    if LOAD_FORMAT not in choices.LOAD_FORMAT_CHOICES:
        choices.add_load_format_choices([LOAD_FORMAT])
    for hook in hooks_here():
        HookRegistry.register(hook.target, hook.function, hook.kind)


def check_registration() -> list[Problem]:
    """Check that the load format is known and that every hook is in its place."""
    remedy = f"look at HOOKS in {__file__} and at the log for the plugin's exception; "
    remedy += f"SGLang is {sglang.__version__}"
    problems = []
    if LOAD_FORMAT not in choices.LOAD_FORMAT_CHOICES:
        problems.append(Problem("--load-format mixedprec", "is not registered", remedy))
    for hook in hooks_here():
        if not _is_applied(hook):
            what = f"is not hooked ({hook.stands_on})"
            problems.append(Problem(hook.target, what, remedy, "hook"))
    return problems


def _is_applied(hook: Hook) -> bool:
    """Whether our function is in the chain of wrappers around the target."""
    function = _target(hook)
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook.function for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _target(hook: Hook) -> Any:
    try:
        return pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return None


@functools.cache
def require_registration() -> None:
    """Raise if the plugin is not whole in this process.

    Raises:
        RegistrationError: with everything that is missing.
    """
    problems = check_registration()
    if problems:
        raise RegistrationError(problems)
