"""The page of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from benchmarks.figures import Figure
from benchmarks.loading.loads import Load

_MIB = 2**20
# what a load of large tensors may take
MAX_RATIOS = {"warm": 1.15, "cold": 1.0}
MAX_PEAK_BYTES = 64 * _MIB


def median(loads: Sequence[Load], loader: str, cache: str, field: str = "seconds") -> float:
    """The median of one loader's loads with the page cache in one state."""
    return statistics.median(_values(loads, loader, cache, field))


def ratio(loads: Sequence[Load], cache: str) -> float:
    """Our median over SGLang's own loader's."""
    return median(loads, "mixedprec", cache) / median(loads, "stock", cache)


def figures_of(name: str, loads: Sequence[Load], is_large: bool) -> list[Figure]:
    """Our medians and memory beside SGLang's own loader's; large models have limits."""
    figures = []
    for cache, most in MAX_RATIOS.items():
        stock, ours = median(loads, "stock", cache), median(loads, "mixedprec", cache)
        limit = most * stock if is_large else None
        figures.append(Figure(f"{name}, {cache}, s", ours, stock, limit))
    peak, stock = (peak_above(loads, loader) / _MIB for loader in ("mixedprec", "stock"))
    limit = MAX_PEAK_BYTES / _MIB if is_large else None
    return [*figures, Figure(f"{name}, peak above the model, MiB", peak, stock, limit)]


def peak_above(loads: Sequence[Load], loader: str) -> int:
    """Bytes beside the model, in the worst of one loader's loads."""
    return max(x.peak - x.model for x in loads if x.loader == loader)


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
        peaks = [peak_above(loads, loader) / _MIB for loader in ("stock", "mixedprec")]
        model = loads[0].model / _MIB
        lines.append(f"| {name} | {model:.1f} | {peaks[0]:.1f} | {peaks[1]:.1f} |")
    return "\n".join(lines) + "\n"


def _spread(loads: Sequence[Load], loader: str, cache: str) -> str:
    values = _values(loads, loader, cache, "seconds")
    return f"{median(loads, loader, cache):.2f} ({min(values):.2f}-{max(values):.2f})"


def page(results: Mapping[str, Sequence[Load]]) -> str:
    """The whole page."""
    repetitions = len(_values(next(iter(results.values())), "stock", "warm", "seconds"))
    return _PAGE.format(
        sglang=version("sglang"), tables=tables(results), repetitions=repetitions, **MAX_RATIOS
    )


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

Tensors are mapped by the safetensors library, as SGLang's own loader does, looked at, and copied
once by the parameters' own weight loaders. A file is reopened after every 32 MiB, so that pages
that were copied do not stay in memory. For the two large models {warm} of SGLang's time from the
page cache, {cold} from the disk, and 64 MiB beside the model are the limits that the measurement
holds ours to.

What remains above the limits of time, by a profile of the large model: a quarter is the search for
weights that are NaN or infinite, which reads every byte once more; an eighth is building the model
without weights, to check the plan against it; files are read in one thread, by SGLang in several.

{tables}
"""
