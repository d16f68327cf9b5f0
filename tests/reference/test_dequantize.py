"""The reference dequantizer against figures that were made by neither it nor the package."""

from __future__ import annotations

import numpy as np
import pytest

from tests.quantize.peers import (
    EXPECTED,
    FILE,
    LAYERS,
    PEERS,
    config,
    is_expected,
    numpy_layer,
    torch_layer,
)
from tests.reference.dequantize import dequantize_checkpoint
from tests.reference.safetensors_file import decode_e4m3, read_safetensors


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("folder", sorted(EXPECTED))
def test_every_peer_checkpoint_dequantizes_as_expected(folder: str, layer: str) -> None:
    weight = dequantize_checkpoint(numpy_layer(folder, layer), config(folder))
    assert weight.dtype == np.float32
    assert is_expected(weight, folder, layer)


def test_all_peers_are_in_the_expected_file() -> None:
    folders = {path.parent.name for path in PEERS.glob(f"*/{FILE}")}
    assert folders == {*EXPECTED, "bf16"}


@pytest.mark.parametrize("folder", sorted([*EXPECTED, "bf16"]))
def test_reader_agrees_with_the_safetensors_package(folder: str) -> None:
    for layer in LAYERS:
        theirs, ours = torch_layer(folder, layer), numpy_layer(folder, layer)
        assert theirs.keys() == ours.keys()
        for suffix, tensor in theirs.items():
            if tensor.dtype.is_floating_point:
                tensor = tensor.float()
            np.testing.assert_array_equal(ours[suffix], tensor.numpy(), strict=True)


def test_folded_awq_shows_in_its_norm() -> None:
    name = "model.layers.0.input_layernorm.weight"
    folded = read_safetensors(PEERS / "autoawq-g64" / FILE)[name]
    base = read_safetensors(PEERS / "bf16" / FILE)[name]
    distance = np.linalg.norm(folded - base) / np.linalg.norm(base)
    expected = EXPECTED["autoawq-g64"][name]["relative_rms_to_bf16"]
    assert distance == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x7E, 448.0), (0x38, 1.0), (0x01, 2.0**-9), (0x08, 2.0**-6), (0xC4, -3.0), (0x80, -0.0)],
)
def test_e4m3_decodes_to_published_values(code: int, value: float) -> None:
    assert decode_e4m3(np.array([code], np.uint8))[0] == value


def test_e4m3_has_one_nan_of_each_sign() -> None:
    decoded = decode_e4m3(np.arange(256, dtype=np.uint8))
    assert np.flatnonzero(np.isnan(decoded)).tolist() == [0x7F, 0xFF]
