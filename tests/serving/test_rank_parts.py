"""Ranks that read and quantize their own parts: SGLang's loaders fill what they always did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mixedprec_plugin.checkpoint.headers import StoredTensor
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_layer
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_mixtral
from tests.presets import write_preset
from tests.serving.stock import load
from tests.tensors import raw

# what is split without a statistic that spans the parts
SPLIT = (
    "unquantized", "fp8_block", "int8", "awq, group_size: 64", "gptq", "gptq_int8",
    "humming_int3, group_size: 64",
)  # fmt: skip
# FP8 has one scale for a tensor, or one for all inputs of an output feature
EVERY = (*SPLIT, "fp8", "fp8_channel", "int8_channel")


class Counting(Reader):
    """Counts the elements of each tensor that are read."""

    read_elements: ClassVar[Counter[str]] = Counter()

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        value = super().read(tensor)
        self.read_elements[tensor.name] += value.numel()
        return value

    def read_part(self, tensor: StoredTensor, box: Sequence[range]) -> torch.Tensor:
        before = self.read_elements[tensor.name]
        value = super().read_part(tensor, box)
        self.read_elements[tensor.name] = before + value.numel()
        return value


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tensor name -> how many of its elements were read."""
    monkeypatch.setattr("mixedprec_plugin.compose.stream.Reader", Counting)
    monkeypatch.setattr(Counting, "read_elements", Counter())
    return Counting.read_elements


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose halves are whole blocks; four query heads a key-value head, untied."""
    config = llama_config(
        hidden_size=256, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1,
        vocab_size=128, intermediate_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    tensors = llama_tensors(config)
    return write_checkpoint(tmp_path_factory.mktemp("ranks") / "model", config, tensors)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("ranks") / "mixture", num_hidden_layers=1)


def _load(folder: Path, preset: Path, rank: int, ep_size: int = 1) -> dict[str, torch.Tensor]:
    from mixedprec_plugin.serving.alone import one_rank

    said = {"mixedprec_config": str(preset)}
    with one_rank(str(folder), 2, rank, ep_size=ep_size):
        model = load(folder, load_format="mixedprec", model_loader_extra_config=said)
    return dict(model.state_dict())


def _load_whole(
    monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """As every rank did before: each tensor is made whole, and narrowed."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "mixedprec_plugin.serving.loader.compose_parts",
            lambda layer, target, reader, cache, quantize: compose_layer(
                layer, target, reader, quantize
            ),
        )
        return _load(*args, **kwargs)


def _assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(raw(tensor), raw(second[name])), name


@pytest.mark.usefixtures("sglang_context")
@pytest.mark.parametrize("scheme", EVERY)
def test_ranks_hold_what_they_did_and_read_only_that(
    model: Path, tmp_path: Path, scheme: str, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = write_preset(tmp_path, f'match: "*", method: {scheme}')
    whole = [_load_whole(monkeypatch, model, preset, rank) for rank in range(2)]
    twice = sum(counted.values())
    counted.clear()
    parts = [_load(model, preset, rank) for rank in range(2)]
    for before, now in zip(whole, parts, strict=True):
        _assert_same(before, now)
    if scheme in SPLIT:
        assert sum(counted.values()) <= 1.1 * twice / 2, counted


@pytest.mark.usefixtures("sglang_context")
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("others", [(), ('match: "*.experts.{0,3}.*", method: gptq',)])
def test_experts_are_read_by_the_ranks_that_run_them(
    mixture: Path, tmp_path: Path, ep_size: int, counted: Counter[str], others: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rules = ('match: "*.experts.*", method: awq, group_size: 64', *others)
    preset = write_preset(tmp_path, *rules)
    whole = [_load_whole(monkeypatch, mixture, preset, rank, ep_size) for rank in range(2)]
    twice = sum(counted.values())
    counted.clear()
    parts = [_load(mixture, preset, rank, ep_size) for rank in range(2)]
    for before, now in zip(whole, parts, strict=True):
        _assert_same(before, now)
    assert sum(counted.values()) <= 1.1 * twice / 2, counted
