"""SGLang's model runner in this process: a prompt, then greedy decoding."""

from __future__ import annotations

import importlib
import json
from array import array
from pathlib import Path
from typing import Any

import torch

from benchmarks.families.trace import Trace, watch

# pools of two dozen tokens: what is tried is the model
MAX_TOTAL_TOKENS = 256


def warm_up() -> None:
    """Import what an engine needs, and hook the plugin in; nothing that starts a thread."""
    torch.set_num_threads(1)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401

    import mixedprec_plugin.serving.loader  # noqa: F401
    from mixedprec_plugin.methods.registry import METHODS

    for spec in METHODS.values():
        if spec.sglang:
            importlib.import_module(spec.sglang)


def server_args(
    model: Path, preset: Path, tp_size: int, max_total_tokens: int = MAX_TOTAL_TOKENS
) -> Any:
    """The arguments of a server; resolved, as each rank gets them."""
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(
        model_path=str(model),
        load_format="mixedprec",
        model_loader_extra_config=json.dumps({"mixedprec_config": str(preset)}),
        device="cpu",
        dtype="bfloat16",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        tp_size=tp_size,
        max_total_tokens=max_total_tokens,
        max_running_requests=2,
        disable_radix_cache=True,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        skip_server_warmup=True,
        log_level="error",
    )
    args.resolve_once()
    return args


def serve(
    args: Any,
    port: int,
    rank: int,
    prompt: list[int],
    num_steps: int,
    forced: list[int],
    *,
    is_traced: bool = True,
) -> dict[str, Any]:
    """Load a model and run it.

    Args:
        args: of `server_args`.
        port: of loopback, for the ranks to meet.
        forced: tokens to go on with instead of the model's own; the greedy ones if empty.
        is_traced: whether to keep what modules are given.
    Returns:
        "logits" float32 [T + num_steps, V], of every position of the prompt and every step;
        "tokens": the greedy one after the prompt, and after each step; "trace": a `Trace`, empty
        where nothing is kept.
    """
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.sampling.sampling_params import SamplingParams

    from mixedprec_plugin.serving.loader import served_config

    ranks = SpawnRanks(world_rank=spawn_world_rank(args, tp_rank=rank, pp_rank=0), gpu_id=rank)
    publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    runner = _model_runner(args, port, rank)
    seen: list[torch.Tensor] = []
    _watch_logits(runner.model, seen)
    trace = watch(served_config(runner.model).built) if is_traced else Trace()
    request = one_batch.Req(
        rid=0,
        origin_input_text="",
        origin_input_ids=array("q", prompt),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=num_steps + 1),
    )
    request.full_untruncated_fill_ids = request.origin_input_ids
    request.logprob_start_len = -1
    request.extend_end = len(prompt)
    token, _, batch = one_batch.extend([request], runner)
    tokens = [int(token)]
    for step in range(num_steps):
        following = torch.tensor([forced[step] if forced else tokens[-1]])
        token, _ = one_batch.decode(following, batch, runner)
        tokens.append(int(token))
    return {"logits": torch.cat(seen).float(), "tokens": tokens, "trace": trace}


def _model_runner(args: Any, port: int, rank: int) -> Any:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_executor.model_runner import ModelRunner

    model_config = ModelConfig.from_server_args(args)
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = ModelRunner(
        model_config=model_config,
        mem_fraction_static=0.5,
        gpu_id=rank,
        nccl_port=port,
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def _watch_logits(model: Any, seen: list[torch.Tensor]) -> None:
    """Keep the logits of all positions; SGLang computes those of the last one."""
    from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor

    def keep(processor: Any, args: Any, kwargs: Any, _: Any) -> None:
        _, hidden_states, lm_head, batch = args[:4]
        metadata = LogitsMetadata.from_forward_batch(batch)
        seen.append(processor._get_logits(hidden_states, lm_head, metadata).clone())

    (processor,) = (m for m in model.modules() if isinstance(m, LogitsProcessor))
    processor.register_forward_hook(keep, with_kwargs=True)
