"""What the ranks of a server read and quantize, counted on a model's headers alone.

python -m benchmarks.rank_parts [--layers 61] [--out docs/rank_parts.md]

SGLang's own DeepSeek-V3 is built without memory for each of eight ranks, and every weight loader is
given the tensors of the plan as a start gives them; what it takes of each is counted, and no value
is read. The preset takes attention as it is stored, in FP8 blocks, and has experts in 4 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

from benchmarks.figures import Figure, keep
from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import TORCH_DTYPES, Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.compose import parts
from mixedprec_plugin.compose.stream import Tensors
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset

RANKS = 8
PRESET = """
version: 1
rules:
  - {match: "*", method: fp8_block}
  - {match: "*.kv_b_proj", method: bf16}
  - {match: "*.mlp.experts.*", method: awq, group_size: 128, requantize: true}
"""


PAGE = """# What tensor-parallel ranks read and quantize

Written by `python -m benchmarks.rank_parts`. Each rank reads the rows and columns that it keeps and
quantizes them alone; experts that another rank runs are not read. Counted for {layers} layers of
DeepSeek-V3, on its published shapes: SGLang's model is built without memory for every rank, its
weight loaders are given the tensors of the plan, and what they take is added up. The served bytes
are those of ranks that make each tensor whole, bit for bit (tests/serving/test_rank_parts.py).

```yaml
{preset}
```

| ranks | experts spread over | bytes read by all | weights quantized by all | of one rank's |
| --- | --- | --- | --- | --- |
{rows}

Not in parts: statistics that span what is split. With one FP8 scale for a tensor, every rank reads
the tensor whole; with one for an output feature, or groups of all inputs (`group_size: -1`), that
holds for `o_proj` and `down_proj`, which are split along their inputs. So does it for formats that
no method serves as they are stored (compressed-tensors' packed integers), for layers in act order
along their inputs, and under `--mixedprec-verify`.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """What all ranks of a layout do together."""

    tp_size: int
    ep_size: int
    read: int
    made: int
    read_ratio: float
    made_ratio: float

    def __str__(self) -> str:
        return (
            f"| {self.tp_size} | {self.ep_size} | {self.read / 1e9:.1f} GB | "
            f"{self.made / 1e9:.1f} G | {self.read_ratio:.3f}, {self.made_ratio:.3f} |"
        )


class Counter(Reader):
    """Counts bytes, and gives tensors without memory."""

    num_bytes = 0

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Count a whole tensor."""
        return self.read_part(tensor, tuple(range(size) for size in tensor.shape))

    def read_finite(self, tensor: StoredTensor) -> torch.Tensor:
        """Count a whole tensor."""
        return self.read(tensor)

    def read_part(self, tensor: StoredTensor, box: Sequence[range]) -> torch.Tensor:
        """Count a part of a tensor."""
        dtype = TORCH_DTYPES[tensor.dtype]
        self.num_bytes += math.prod(map(len, box)) * dtype.itemsize
        return torch.empty([len(indices) for indices in box], dtype=dtype, device="meta")


class Work:
    """Counts the weights that are quantized."""

    num_weights = 0

    def compute(self, layer: PlannedLayer, stored: Tensors, target: Target, *_: object) -> Tensors:
        """In place of `compute`: the tensors of the part, without memory."""
        N, K = stored["weight"].shape
        self.num_weights += N * K
        assert layer.scheme is not None
        specs = METHODS[layer.method].stored(layer.scheme.arguments, N, K, target.dtype)
        return {
            suffix: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            for suffix, spec in specs.items()
        }


def count(plan: Plan, folder: Path, tp_size: int, ep_size: int, rank: int) -> tuple[int, int]:
    """Bytes read and weights quantized by one rank."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig

    from mixedprec_plugin.serving.alone import one_rank
    from mixedprec_plugin.serving.building import build_model
    from mixedprec_plugin.serving.config import MixedPrecisionConfig
    from mixedprec_plugin.serving.filling import Filling
    from mixedprec_plugin.serving.hooks import asked_for
    from mixedprec_plugin.serving.outline import outline_of

    reader, work = Counter(), Work()
    with one_rank(str(folder), tp_size, rank, ep_size=ep_size), asked_for():
        model_config = ModelConfig(str(folder), dtype="bfloat16")
        model_config.quantization = None
        others = outline_of(plan, model_config, LoadConfig()).check().others
        config = MixedPrecisionConfig(plan, others)
        model, stage = build_model(model_config, LoadConfig(), config, torch.device("meta"))
        compute = mock.patch.object(parts, "compute", work.compute)
        as_stored = mock.patch.object(
            parts, "take_as_stored", lambda _layer, stored, _target: stored
        )
        with compute, as_stored:
            filling = Filling(model, config, _tensors(plan, stage.runs, reader))
    assert not filling.problems, filling.problems
    return reader.num_bytes, work.num_weights


def _tensors(plan: Plan, runs: object, reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    assert callable(runs)
    for layer in plan.layers:
        if layer.kind != "draft" and runs(layer):
            for suffix, tensor in parts.compose_parts(layer, plan.target, reader).items():
                yield f"{layer.name}.{suffix}", tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and write the page; return 0 where no ranks do over 1.1 of what one does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_parts", description=__doc__)
    parser.add_argument("--layers", type=int, default=61, help="of DeepSeek-V3's 61")
    parser.add_argument("--out", type=Path, help="Markdown page that is written")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.models.registry  # noqa: F401
        from sglang.srt.plugins import load_plugins
    load_plugins()
    from tests import published

    whole = (0, 0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = published.deepseek_v3(options.layers).write(Path(name) / "model")
        path = Path(name) / "preset.yaml"
        path.write_text(PRESET, encoding="utf-8")
        for tp_size, ep_size in ((1, 1), (RANKS, 1), (RANKS, RANKS)):
            target = Target(device="cpu", tp_size=tp_size)
            plan = resolve_plan(load_preset(path), open_source(folder), target).check()
            ranks = [count(plan, folder, tp_size, ep_size, rank) for rank in range(tp_size)]
            read, made = sum(n for n, _ in ranks), sum(n for _, n in ranks)
            whole = whole if tp_size > 1 else (read, made)
            rows.append(Row(tp_size, ep_size, read, made, read / whole[0], made / whole[1]))
    page = PAGE.format(layers=options.layers, preset=PRESET.strip(), rows="\n".join(map(str, rows)))
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    one, *others = rows
    figures = [
        Figure(f"{row.tp_size} ranks, experts over {row.ep_size}, {what}", ours, peer, 1.1 * peer)
        for row in others
        for what, ours, peer in (
            ("GB read", row.read / 1e9, one.read / 1e9),
            ("G weights quantized", row.made / 1e9, one.made / 1e9),
        )
    ]
    return int(not keep("rank parts", figures))


if __name__ == "__main__":
    raise SystemExit(main())
