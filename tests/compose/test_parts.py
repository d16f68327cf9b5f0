"""Parts of a layer's tensors against the same parts of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.checkpoint.reader import Reading
from mixedprec_plugin.compose.lazy import LazyTensor
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.methods.registry import METHODS
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_checkpoint, write_llama
from tests.presets import plan
from tests.tensors import raw
from tests.verify.slices import write_slices

# every method, in every grain that it has
SCHEMES = {
    "awq": ("awq, group_size: 32", "awq, group_size: -1"),
    "gptq": ("gptq, group_size: 64", "gptq, bits: 8, group_size: 128", "gptq, group_size: -1"),
    "fp8": ("fp8, weight_block_size: [128, 128]", "fp8"),
    "fp8_channel": ("fp8_channel",),
    "blockwise_int8": ("blockwise_int8",),
    "int8_channel": ("int8_channel",),
    "humming": ("humming_int3, group_size: 64", "humming, bits: 6", "humming_int5, group_size: 32"),
    "bf16": ("unquantized",),
}
EVERY = [scheme for of in SCHEMES.values() for scheme in of]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of 256 features; its MLP has 384, which are not a power of two."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    return write_llama(tmp_path_factory.mktemp("parts") / "model", **sizes)


def made(model: Path, scheme: str) -> Plan:
    return plan(model, f'match: "*", method: {scheme}', target=Target(dtype="BF16"))


def assert_parts_are_of_the_whole(plan: Plan, how: Reading, least: int = 8) -> None:
    whole = dict(iter(VirtualCheckpoint(plan, how=how)))
    generator = torch.Generator().manual_seed(3)
    num_lazy = 0
    for name, tensor in VirtualCheckpoint(plan, how=how, compose=compose_parts):
        expected = whole.pop(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        if not isinstance(tensor, LazyTensor):
            assert torch.equal(tensor, expected), name
            continue
        num_lazy += 1
        for _ in range(3):
            part, same = tensor, expected
            for dim, size in enumerate(tensor.shape):
                first, last = sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())
                if first < last:
                    part, same = (x.narrow(dim, first, last - first) for x in (part, same))
            assert torch.equal(raw(part.clone()), raw(same.contiguous())), name
            if part.dim() == 2:
                turned = torch.empty_like(same.t()).copy_(part.t())
                assert torch.equal(turned.float(), same.t().float()), name
            if part.dim() == 2 and 1 not in part.shape:
                rows = part.t().contiguous().view(torch.uint8)
                assert torch.equal(rows, raw(same.t()).view(len(rows), -1)), name
    assert not whole
    assert num_lazy >= least


def test_every_method_that_makes_parts_is_tried() -> None:
    assert SCHEMES.keys() >= {name for name, m in METHODS.items() if m.quantizes_parts}


@pytest.mark.parametrize("scheme", EVERY)
def test_any_part_is_that_part_of_the_whole(model: Path, scheme: str) -> None:
    # read by ranges of bytes where nothing may be mapped
    how = Reading(may_map=scheme != "awq, group_size: 32")
    assert_parts_are_of_the_whole(made(model, scheme), how)


@pytest.mark.parametrize(
    ("stored", "scheme"),
    [
        ("fp8_block", "unquantized"),
        ("fp8_block", "awq, requantize: true"),
        ("gptq", "unquantized"),
        ("gptq", "awq"),
        ("gptq", "fp8_channel, requantize: true"),
        ("fp8_channel", "int8, requantize: true"),
        ("fp8_block", "auto"),
    ],
)
def test_parts_of_what_is_stored_otherwise_are_of_the_whole(
    model: Path, tmp_path: Path, stored: str, scheme: str
) -> None:
    plan = made(model, stored)
    tensors = dict(iter(VirtualCheckpoint(plan)))
    scheme_of = plan.by_name["model.layers.0.mlp.up_proj"].scheme
    assert scheme_of is not None
    said = METHODS[scheme_of.method].declare(scheme_of.arguments)
    config = {**plan.source.config, "quantization_config": said}
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    assert_parts_are_of_the_whole(made(folder, scheme), Reading())


def test_zero_points_of_stored_codes_are_told_where_only_parts_are_read(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "model", "peers", "gptqmodel-asym-g64")
    assert_parts_are_of_the_whole(made(folder, "unquantized"), Reading(), least=2)
