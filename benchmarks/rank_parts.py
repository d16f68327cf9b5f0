"""What the ranks of a server read and quantize, counted on a model's headers alone.

python -m benchmarks.rank_parts [--layers 61]

SGLang's own DeepSeek-V3 is built without memory for each of eight ranks, and every weight loader is
given the tensors of the plan as a start gives them; what it takes of each is counted, and no value
is read. The preset takes attention as it is stored, in FP8 blocks, and has experts in 4 bits.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

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

    def compute(
        self, layer: PlannedLayer, stored: Tensors, target: Target, *_: object
    ) -> Tensors:
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
    from mixedprec_plugin.serving.hooks import asked_for
    from mixedprec_plugin.serving.outline import outline_of
    from mixedprec_plugin.serving.placement import fill

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
            filling = fill(model, config, _tensors(plan, stage.runs, reader))
    assert not filling.problems, filling.problems
    return reader.num_bytes, work.num_weights


def _tensors(plan: Plan, runs: object, reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    assert callable(runs)
    for layer in plan.layers:
        if layer.kind != "draft" and runs(layer):
            for suffix, tensor in parts.compose_parts(layer, plan.target, reader).items():
                yield f"{layer.name}.{suffix}", tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; return 0 where no row is over 1.1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_parts", description=__doc__)
    parser.add_argument("--layers", type=int, default=61, help="of DeepSeek-V3's 61")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.models.registry  # noqa: F401
        from sglang.srt.plugins import load_plugins
    load_plugins()
    from tests import published

    most = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = published.deepseek_v3(options.layers).write(Path(name) / "model")
        path = Path(name) / "preset.yaml"
        path.write_text(PRESET, encoding="utf-8")
        rows: dict[tuple[int, int], tuple[int, int]] = {}
        print("tensor parallel  experts over  bytes read  weights quantized  of one rank's")
        for tp_size, ep_size in ((1, 1), (RANKS, 1), (RANKS, RANKS)):
            target = Target(device="cpu", tp_size=tp_size)
            plan = resolve_plan(load_preset(path), open_source(folder), target).check()
            ranks = [count(plan, folder, tp_size, ep_size, rank) for rank in range(tp_size)]
            rows[tp_size, ep_size] = sum(n for n, _ in ranks), sum(n for _, n in ranks)
            read, made = rows[tp_size, ep_size]
            ratios = read / rows[1, 1][0], made / rows[1, 1][1]
            most = max(most, *ratios)
            print(
                f"{tp_size:15}  {ep_size:12}  {read / 1e9:7.1f} GB  {made / 1e9:16.1f}G"
                f"  {ratios[0]:.3f} read, {ratios[1]:.3f} quantized"
            )
    return int(most > 1.1)


if __name__ == "__main__":
    raise SystemExit(main())
