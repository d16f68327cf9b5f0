"""What became of every cell, as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.dryrun.cards import CARDS

Result = Mapping[str, Any]
Outcomes = Mapping[tuple[str, str, int], str]
# section -> (key of the results, column of what stands in a row)
SECTIONS: Mapping[str, tuple[str, str]] = {
    "matrix": ("cells", "layers (tensor parallel)"),
    "experts": ("experts", "experts (tensor parallel)"),
}
_WORDS = {
    "aten:mm": "mm",
    "aten:addmm": "mm",
    "jit:gptq_marlin_gemm": "Marlin",
    "humming:humming_gemm": "humming",
    "jit:awq_dequantize": "awq_dequantize",
    "aten:_scaled_mm": "torch._scaled_mm",
    "sgl_kernel:fp8_scaled_mm": "fp8_scaled_mm",
    "sgl_kernel:int8_scaled_mm": "int8_scaled_mm",
    "deep_gemm:fp8_fp4_gemm_nt": "DeepGEMM",
    "triton:_w8a8_block_fp8_matmul": "Triton block matmul",
    "triton:_w8a8_block_int8_matmul": "Triton block matmul",
    "triton:fused_moe_kernel": "fused_moe_kernel",
    "jit:moe_wna16_marlin_gemm": "Marlin",
}


def render(results: Mapping[str, Result], section: str) -> str:
    """A section of the page: what fares alike on every card shares a row.

    Args:
        results: title of a card -> what its process wrote.
        section: key of `SECTIONS`, or `models`.
    """
    if section == "models":
        return _render_models(results)
    key, column = SECTIONS[section]
    outcomes = {title: _outcomes(result[key], title) for title, result in results.items()}
    first = next(iter(outcomes.values()))
    rows: dict[tuple[str, tuple[str, ...]], list[tuple[str, int]]] = {}
    methods = list(dict.fromkeys(method for method, _, _ in first))
    for method, kind, tp_size in sorted(first, key=lambda place: methods.index(place[0])):
        fares = tuple(outcomes[title][method, kind, tp_size] for title in results)
        rows.setdefault((method, fares), []).append((kind, tp_size))
    lines = _heads(["method", column], results)
    lines += [
        f"| {method} | {_where(where)} | {' | '.join(fares)} |"
        for (method, fares), where in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _outcomes(cells: Sequence[Mapping[str, Any]], title: str) -> Outcomes:
    """Of the dtype that SGLang would choose on the card."""
    return {
        (cell["method"], cell["kind"], cell["tp_size"]): outcome(cell)
        for cell in cells
        if cell["dtype"] == CARDS[title].dtype
    }


def outcome(cell: Mapping[str, Any]) -> str:
    """What stands in a cell: the kernels, or the kind of refusal."""
    if cell["foretold"]:
        return _reason(cell["foretold"][0])
    if cell["broken"] or cell["refused"]:
        return "BROKEN"
    kernels = [_WORDS[kernel] for kernel in cell["kernels"] if kernel in _WORDS]
    return " + ".join(dict.fromkeys(kernels))


def _reason(text: str) -> str:
    if "compute capability" in text or "does not have (expected" in text:
        return "refused: GPU"
    if "bfloat16" in text:
        return "refused: dtype"
    return "refused: lm_head" if "lm_head" in text else "refused: shape"


def _render_models(results: Mapping[str, Result]) -> str:
    rows: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}
    for title, result in results.items():
        for model in result["models"]:
            row = rows.setdefault((model["name"], _mix(model)), {})
            row.setdefault(title, {}).setdefault(_model_outcome(model), []).append(model["tp_size"])
    lines = _heads(["model", "in its layers"], results)
    for (name, mix), row in rows.items():
        cells = [
            "; ".join(
                f"{text} ({', '.join(map(str, sizes))})"
                for text, sizes in row.get(title, {}).items()
            )
            for title in results
        ]
        lines.append(f"| {name} | {mix} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mix(model: Mapping[str, Any]) -> str:
    return f"{model['mix']}, `{model['setting']}=1`" if model["setting"] else str(model["mix"])


def _model_outcome(model: Mapping[str, Any]) -> str:
    if model["broken"]:
        return "BROKEN"
    return _reason(model["refused"]) if model["refused"] else "runs"


def _heads(columns: list[str], results: Iterable[str]) -> list[str]:
    heads = [*columns, *map(heading, results)]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]


def heading(title: str) -> str:
    """A card's column."""
    major, minor = CARDS[title].capability
    return f"{title} ({major}.{minor})"


def _where(places: Iterable[tuple[str, int]]) -> str:
    sizes: dict[str, list[int]] = {}
    for kind, tp_size in places:
        sizes.setdefault(kind, []).append(tp_size)
    groups: dict[tuple[int, ...], list[str]] = {}
    for kind, held in sizes.items():
        groups.setdefault(tuple(held), []).append(kind)
    return "; ".join(
        f"{', '.join(kinds)} ({', '.join(map(str, held))})" for held, kinds in groups.items()
    )


def cells_of(page: str, section: str, title: str) -> dict[tuple[str, str, int], str]:
    """What a page says of a card: (method, kind, tensor-parallel size) -> what stands there."""
    lines = between(page, section).splitlines()
    column = [cell.strip() for cell in lines[0].split("|")].index(heading(title))
    found = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        for group in cells[2].split("; "):
            kinds, _, sizes = group.rstrip(")").partition(" (")
            for kind in kinds.split(", "):
                for size in sizes.split(", "):
                    found[cells[1], kind, int(size)] = cells[column]
    return found


def said_of(result: Result, section: str, title: str) -> Outcomes:
    """What a page must say of a card."""
    return _outcomes(result[SECTIONS[section][0]], title)


def between(page: str, section: str) -> str:
    """The section of a page, between its marks."""
    return page.partition(_begin(section))[2].partition(_end(section))[0]


def write(path: Path, section: str, text: str) -> None:
    """Put a section between its marks."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(_begin(section))
    _, _, after = rest.partition(_end(section))
    whole = before + _begin(section) + text + _end(section) + after
    path.write_text(whole, encoding="utf-8")


def _begin(section: str) -> str:
    return f"<!-- {section} -->\n"


def _end(section: str) -> str:
    return f"<!-- end of {section} -->\n"
