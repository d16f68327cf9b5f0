"""Which experts of a layer run in which scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang.srt.layers.quantization.base_config import QuantizationConfig

from mixedprec_plugin.errors import LoadError, Problem


@dataclasses.dataclass(frozen=True)
class ExpertGroup:
    """Experts of one layer that share a scheme.

    Attributes:
        ids: the experts, as the checkpoint and the router count them.
        method: canonical name of the scheme's method.
        label: the scheme's name, for messages.
        config: SGLang's quantization config of the scheme; None for unquantized experts.
    """

    ids: tuple[int, ...]
    method: str
    label: str
    config: QuantizationConfig | None = None


def check_groups(where: str, groups: Sequence[ExpertGroup], num_experts: int) -> None:
    """Check that groups hold the experts of a layer; a plan has each of them in one.

    Raises:
        LoadError: experts are in no group, or the layer has not got them.
    """
    ids = {expert for group in groups for expert in group.ids}
    own = set(range(num_experts))
    findings = {
        "are in no group": own - ids,
        f"do not exist (expected 0 to {num_experts - 1})": ids - own,
    }
    problems = [
        Problem(where, f"experts {', '.join(map(str, sorted(found)))} {what}", rule="expert-groups")
        for what, found in findings.items()
        if found
    ]
    if problems:
        raise LoadError(problems)


def groups_within(groups: Sequence[ExpertGroup], ids: range) -> list[ExpertGroup]:
    """The part of each group that is in a range of experts, where there is any."""
    own = [
        dataclasses.replace(group, ids=tuple(expert for expert in group.ids if expert in ids))
        for group in groups
    ]
    return [group for group in own if group.ids]
