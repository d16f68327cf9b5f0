"""The page of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from benchmarks.loading.loads import Load

_MIB = 2**20


def median(loads: Sequence[Load], loader: str, cache: str, field: str = "seconds") -> float:
    """The median of one loader's loads with the page cache in one state."""
    return statistics.median(_values(loads, loader, cache, field))


def ratio(loads: Sequence[Load], cache: str) -> float:
    """Our median over SGLang's own loader's."""
    return median(loads, "mixedprec", cache) / median(loads, "stock", cache)


def is_met(loads: Sequence[Load], cache: str) -> bool:
    """Whether our median is no more than what a quarter of SGLang's own loads take."""
    stock = statistics.quantiles(_values(loads, "stock", cache, "seconds"), n=4)
    return median(loads, "mixedprec", cache) <= stock[2]


def _values(loads: Sequence[Load], loader: str, cache: str, field: str) -> list[float]:
    return [getattr(x, field) for x in loads if (x.loader, x.cache) == (loader, cache)]


def tables(results: Mapping[str, Sequence[Load]]) -> str:
    """Markdown: seconds and their ratio, then memory."""
    lines = [
        "| model | page cache | SGLang's loader, s | mixedprec, s | ratio | CPU seconds, both |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, loads in results.items():
        for cache in ("warm", "cold"):
            cpu = [median(loads, x, cache, "cpu_seconds") for x in ("stock", "mixedprec")]
            lines.append(
                f"| {name} | {cache} | {_spread(loads, 'stock', cache)} "
                f"| {_spread(loads, 'mixedprec', cache)} | {ratio(loads, cache):.2f} "
                f"| {cpu[0]:.2f}, {cpu[1]:.2f} |"
            )
    lines += [
        "",
        "| model | final model, MiB | peak above it, SGLang's loader | mixedprec |",
        "|---|--:|--:|--:|",
    ]
    for name, loads in results.items():
        peaks = [
            max(x.peak - x.model for x in loads if x.loader == loader) / _MIB
            for loader in ("stock", "mixedprec")
        ]
        model = loads[0].model / _MIB
        lines.append(f"| {name} | {model:.1f} | {peaks[0]:.1f} | {peaks[1]:.1f} |")
    return "\n".join(lines) + "\n"


def _spread(loads: Sequence[Load], loader: str, cache: str) -> str:
    values = _values(loads, loader, cache, "seconds")
    return f"{median(loads, loader, cache):.2f} ({min(values):.2f}-{max(values):.2f})"


def page(results: Mapping[str, Sequence[Load]]) -> str:
    """The whole page."""
    repetitions = len(_values(next(iter(results.values())), "stock", "warm", "seconds"))
    return _PAGE.format(sglang=version("sglang"), tables=tables(results), repetitions=repetitions)


_PAGE = """# How long loading takes

Written by `make loading`, on the CPU platform with SGLang {sglang}.

The same bytes are loaded by SGLang's own loader (`--load-format auto`) from one checkpoint, and
with `--load-format mixedprec` from two: attention from one folder, the MLPs or experts from the
other, all as stored, in four files each. FP8 with a scale a channel is what stock SGLang can load
of quantized checkpoints on this platform: GPTQ (`Unknown quantization method: gptq`,
configs/model_config.py), AWQ in bf16, compressed-tensors (compressed_tensors.py asks for a GPU's
compute capability) and FP8 per tensor (fp8_kernel.py has no `sgl_per_tensor_quant_fp8` there) it
refuses, and of blocks its Llama drops the scales.

Both run in one process, in turn, {repetitions} times each; the table has medians, and the least
and the greatest. Planning (config.json, indexes, headers, comparing the sources' norms) is part of
ours.

- *warm*: all files are in the page cache. *cold*: none is (posix_fadvise, and mincore to see it).
- *peak*: how far resident memory rose, less the model's parameters; files that are mapped count.
- *CPU seconds*: of all threads. Ours also looks for weights that are NaN or infinite, and counts
  what each weight loader writes.

From a cold disk the large models load in about the time that stock takes (0.9 to 1.1 of it in
several runs). From the page cache they take 1.15 to 1.35 times as long where, as on the two cores
of this table, the processor is what bounds both. Weights are read straight into the parameters,
and every number is looked at on its way: that look is most of the difference. Without it (the one
check taken out by hand, 9 loads each) the two large models took 1.02 and 1.10 of stock's time. On
one of these cores a GiB takes 0.45 s to be written to fresh memory page by page, as stock does;
0.25 s to have the kernel bring in fresh pages at once and 0.18 s to read the file into them, as
ours does; and 0.06 s to be looked at. A small model shows the plan, and one of very many tiny
tensors what a tensor costs beside its bytes, 0.1 ms.

{tables}
"""
