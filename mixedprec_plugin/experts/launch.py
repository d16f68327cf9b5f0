"""Launch options that do not go with experts in several schemes, found before anything starts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# methods whose experts SGLang runs in Marlin's kernels, and only when it may choose them itself
# (gptq_kernels.py, awq_moe.py: `assert get_moe_runner_backend().is_auto()`)
MARLIN_METHODS = frozenset({"awq", "gptq"})
# methods whose experts run in SGLang's Triton kernels
TRITON_METHODS = frozenset({"bf16", "fp8", "blockwise_int8"})

# field of ServerArgs, the values that go, what it is and why it does not go, what to do
_OPTIONS: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    (
        "ep_size",
        (None, 1),
        "expert parallelism gives every rank an equal part of the experts, whose schemes would "
        "differ from rank to rank",
        "start without it: tensor parallelism splits each expert",
    ),
    (
        "moe_a2a_backend",
        (None, "none"),
        "a backend that dispatches tokens itself needs all experts of a layer in one scheme",
        "start without it",
    ),
    (
        "enable_eplb",
        (None, False),
        "the expert balancer moves weights between experts, which needs them in one scheme",
        "start without it",
    ),
    (
        "ep_num_redundant_experts",
        (None, 0),
        "copies of experts belong to expert parallelism",
        "start without it",
    ),
    (
        "init_expert_location",
        (None, "trivial"),
        "expert placement belongs to expert parallelism",
        "start without it",
    ),
    (
        "elastic_ep_backend",
        (None, "none"),
        "elastic expert parallelism moves experts between ranks",
        "start without it",
    ),
    (
        "dwdp_size",
        (None, 0, 1),
        "replicating expert weights needs them in one scheme",
        "start without it",
    ),
    (
        "kt_weight_path",
        (None, ""),
        "KTransformers takes over the experts' method",
        "start without it",
    ),
    (
        "enable_paged_experts",
        (None, False),
        "paging experts takes over the experts' method",
        "start without it",
    ),
    (
        "enable_lora",
        (None, False),
        "LoRA replaces the layers of experts by its own",
        "start without adapters, or give all experts of a layer one scheme",
    ),
    (
        "lora_paths",
        (None, [], {}),
        "LoRA replaces the layers of experts by its own",
        "start without adapters, or give all experts of a layer one scheme",
    ),
    (
        "enforce_shared_experts_fusion",
        (None, False),
        "shared experts cannot be fused into routed ones of several schemes",
        "start without it",
    ),
)


def why_not_composite(server_args: Any, methods: Collection[str] = ()) -> list[tuple[str, str]]:
    """Launch options that keep experts of one layer from running in several schemes.

    Args:
        server_args: SGLang's ServerArgs, or the namespace that they are made from; fields that it
            has not got are taken for their defaults.
        methods: canonical names of the methods of the composite layers' experts.
    Returns:
        (what is wrong, remedy) pairs; empty if nothing is.
    """
    found = [
        (f"{_flag(field)} {value!r}: {reason} (expected {allowed[-1]!r})", remedy)
        for field, allowed, reason, remedy in _OPTIONS
        if (value := getattr(server_args, field, None)) not in allowed
    ]
    if fault := backend_fault(_backend(server_args), methods):
        found.append((fault, "start without --moe-runner-backend"))
    return found


def why_not_experts(server_args: Any, methods: Collection[str]) -> list[tuple[str, str]]:
    """Launch options that SGLang's own methods for quantized experts do not take.

    Args:
        server_args: as for `why_not_composite`.
        methods: canonical names of the methods that some layer's experts run in.
    Returns:
        (what is wrong, remedy) pairs; empty if nothing is.
    """
    backend = _backend(server_args)
    fixed = sorted(MARLIN_METHODS.intersection(methods))
    if backend == "auto" or not fixed:
        return []
    text = (
        f"--moe-runner-backend {backend!r}: SGLang runs experts in {' and '.join(fixed)} in Marlin "
        "kernels, and only where it may choose (expected 'auto')"
    )
    return [(text, "start without --moe-runner-backend")]


def backend_fault(backend: str, methods: Collection[str] = ()) -> str:
    """Why a MoE runner backend does not serve a composite layer; empty if it does.

    Args:
        backend: value of `--moe-runner-backend`.
        methods: canonical names of the methods of the layer's experts.
    """
    is_triton = bool(methods) and TRITON_METHODS.issuperset(methods)
    allowed = ("auto", "triton") if is_triton else ("auto",)
    if backend in allowed:
        return ""
    return (
        f"--moe-runner-backend {backend!r}: the methods of a layer whose experts run in several "
        f"schemes each have a backend of their own (expected {' or '.join(map(repr, allowed))})"
    )


def _backend(server_args: Any) -> str:
    return str(getattr(server_args, "moe_runner_backend", None) or "auto")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
