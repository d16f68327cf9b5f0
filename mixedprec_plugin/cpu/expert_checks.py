"""What the CPU platform does not run of a layer of experts, said when the layer is built."""

from __future__ import annotations

from collections.abc import Collection

from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

from mixedprec_plugin.errors import MethodError, Problem, ShapeError


def check_form(layer: FusedMoE, method: str, activations: Collection[str]) -> None:
    """Refuse experts that the loop of `experts.py` would compute otherwise than CUDA does.

    Args:
        layer: the experts, their runner config set.
        method: name of the method, for the message.
        activations: those that the method's kernels run on CUDA.
    Raises:
        MethodError: with everything that is not run.
    """
    config = layer.moe_runner_config
    unsupported = {
        f"the activation {config.activation!r} (expected {', '.join(activations)})": (
            config.activation not in activations
        ),
        "experts without a gate": not config.is_gated,
        "biases": layer.with_bias,
        "a clamped or scaled gate": any(
            value is not None
            for value in (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
        ),
        "shared experts fused into the routed ones": layer.num_fused_shared_experts > 0,
    }
    found = [name for name, present in unsupported.items() if present]
    if found:
        raise MethodError(
            Problem(
                where=layer.layer_name,
                what=f"the CPU platform does not run experts in {method} with {', '.join(found)}",
                remedy="leave these experts as they are stored, or run on a GPU",
                rule="experts-form",
            )
        )


def check_multiple(layer: FusedMoE, method: str, unit: int, unit_name: str) -> None:
    """Refuse experts whose hidden or intermediate size a group or block does not divide.

    Args:
        layer: the experts.
        method: name of the method, for the message.
        unit: elements along K that share a scale.
        unit_name: what the unit is called.
    Raises:
        ShapeError: with every size that is no multiple.
    """
    sizes = {
        "hidden size": layer.hidden_size,
        "intermediate size a rank": layer.intermediate_size_per_partition,
    }
    problems = [
        Problem(
            where=layer.layer_name,
            what=f"{name} {size} in {method} (expected a multiple of {unit}, the {unit_name})",
            remedy=f"give the experts a smaller {unit_name} or another method, or fewer ranks",
            rule="experts-shape",
        )
        for name, size in sizes.items()
        if unit <= 0 or size % unit
    ]
    if problems:
        raise ShapeError(problems)
