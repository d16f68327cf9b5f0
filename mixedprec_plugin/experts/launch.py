"""Launch options that do not go with the experts of a plan, found before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from mixedprec_plugin.methods.registry import METHODS

# field of ServerArgs, the values that go, why others do not; and what to do, if not to leave it out
Option = tuple[str, tuple[Any, ...], str] | tuple[str, tuple[Any, ...], str, str]

DEEPEP = "deepep"
_DEEPGEMM_CAPABILITY, _DEEPGEMM_BLOCK = 90, [128, 128]
_WITHOUT = "start without it: --ep-size alone splits experts over ranks"
_A_SCHEME = "behind it experts run in block FP8 alone (expected fp8_block for all of the model)"
_DISPATCHERS: tuple[Option, ...] = (
    (
        "moe_a2a_backend",
        (None, DEEPEP, "none"),
        "where a backend dispatches tokens, SGLang chooses the experts' kernels by the class of "
        "the one quantization config of the whole model",
        _WITHOUT,
    ),
)
_TAKEN_OVER = "takes over the experts' method"
# whatever the schemes
_NO_EXPERTS: tuple[Option, ...] = (
    (
        "elastic_ep_backend",
        (None, "none"),
        "experts of a lost rank would be read again past the plan",
    ),
    (
        "dwdp_size",
        (None, 0, 1),
        "SGLang copies experts' weights by the names of unquantized parameters",
    ),
    ("kt_weight_path", (None, ""), f"KTransformers {_TAKEN_OVER}"),
    ("enable_paged_experts", (None, False), f"paging experts {_TAKEN_OVER}"),
)

# where schemes differ from layer to layer
_ALIKE_EXPERTS: tuple[Option, ...] = (
    (
        "enable_eplb",
        (None, False),
        "SGLang moves the experts of all layers through buffers of the first layer's shapes and "
        "dtypes, which needs all of them in one scheme",
        "start without it, or give all experts one scheme",
    ),
)

_PLACE = "would need a place in its scheme's group"
_LORA = (
    "LoRA replaces the layers of experts by its own",
    "start without adapters, or give all experts of a layer one scheme",
)
# where the experts of one layer are in several schemes
_OPTIONS: tuple[Option, ...] = (
    (
        "enable_eplb",
        (None, False),
        "the expert balancer moves weights between experts, which needs them in one scheme",
    ),
    ("ep_num_redundant_experts", (None, 0), f"a copy of an expert {_PLACE}"),
    ("init_expert_location", (None, "trivial"), f"a placed expert {_PLACE}"),
    ("enable_lora", (None, False), *_LORA),
    ("lora_paths", (None, [], {}), *_LORA),
)


def refused(server_args: Any, options: Iterable[Option]) -> Iterator[tuple[str, str, str]]:
    """Yield flag, what is wrong with its value, and remedy ("" for none of its own)."""
    for field, served, reason, *remedy in options:
        value = getattr(server_args, field, None)
        if value not in served:
            flag = "--" + field.replace("_", "-")
            yield flag, f"{value!r}: {reason} (expected {served[-1]!r})", "".join(remedy)


def why_not_composite(server_args: Any, methods: Collection[str] = ()) -> list[tuple[str, str]]:
    """Launch options that keep experts of one layer from running in several schemes.

    Args:
        server_args: SGLang's ServerArgs, or the namespace that they are made from; fields that it
            has not got are taken for their defaults.
    Returns:
        (what is wrong, remedy) pairs; empty if nothing is.
    """
    found = _not_allowed(server_args, _OPTIONS)
    if fault := backend_fault(_backend(server_args), methods):
        found.append((fault, "start without --moe-runner-backend"))
    return found


def why_not_experts(
    server_args: Any,
    methods: Collection[str],
    *,
    are_alike: bool = True,
    why_not_deepep: str = _A_SCHEME,
) -> list[tuple[str, str]]:
    """Launch options that experts of a plan do not take, be each layer in one scheme or several.

    Args:
        are_alike: whether all experts of all layers run in one scheme.
        why_not_deepep: why they do not run behind DeepEP; empty if they do.
    Returns:
        (what is wrong, remedy) pairs; empty if nothing is.
    """
    if not methods:
        return []
    found = _not_allowed(server_args, _NO_EXPERTS)
    if getattr(server_args, "moe_a2a_backend", None) == DEEPEP:
        if why_not_deepep:
            found.append((f"--moe-a2a-backend {DEEPEP!r}: {why_not_deepep}", _WITHOUT))
    else:
        found += _not_allowed(server_args, _DISPATCHERS)
    if not are_alike:
        found += _not_allowed(server_args, _ALIKE_EXPERTS)
    backend = _backend(server_args)
    without = sorted(m for m in methods if backend not in METHODS[m].moe_backends)
    if backend == "auto" or not without:
        return found
    taken = sorted(frozenset.intersection(*(METHODS[m].moe_backends for m in without)))
    text = (
        f"--moe-runner-backend {backend!r}: SGLang does not run experts in {' and '.join(without)} "
        f"in it (expected {' or '.join(map(repr, ['auto', *taken]))})"
    )
    return [*found, (text, "start without --moe-runner-backend")]


def backend_fault(backend: str, methods: Collection[str] = ()) -> str:
    """Why a MoE runner backend does not serve a composite layer; empty if it does."""
    is_triton = bool(methods) and all(METHODS[m].moe_kernels == "triton" for m in methods)
    allowed = ("auto", "triton") if is_triton else ("auto",)
    if backend in allowed:
        return ""
    return (
        f"--moe-runner-backend {backend!r}: the methods of a layer whose experts run in several "
        f"schemes each have a backend of their own (expected {' or '.join(map(repr, allowed))})"
    )


def _not_allowed(server_args: Any, options: Iterable[Option]) -> list[tuple[str, str]]:
    found = refused(server_args, options)
    return [(f"{flag} {what}", remedy or "start without it") for flag, what, remedy in found]


def _backend(server_args: Any) -> str:
    return str(getattr(server_args, "moe_runner_backend", None) or "auto")


def deepep_fault(schemes: Collection[tuple[str, Mapping[str, Any]]], capability: int) -> str:
    """Why experts do not run behind DeepEP; empty if they do.

    Args:
        schemes: method and arguments of all experts of the model.
        capability: the GPU's compute capability, 90 for 9.0; 0 without one.
    Source: layers/moe/ep_moe/layer.py:106, layers/deep_gemm_wrapper/configurer.py:34,
    layers/quantization/fp8.py:2190.
    """
    for method, arguments in schemes:
        is_block = list(arguments.get("weight_block_size") or ()) == _DEEPGEMM_BLOCK
        if not is_block or "deep_gemm" not in METHODS[method].moe_backends:
            return _A_SCHEME
    if capability != _DEEPGEMM_CAPABILITY:
        return (
            "SGLang runs block FP8 behind it in DeepGEMM, which is not there below compute "
            "capability 9.0, and from 10.0 on rounds experts a second time, to scales that are "
            "powers of two (expected 9.0)"
        )
    return ""
