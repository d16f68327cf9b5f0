"""Experts of one layer in four schemes, and all in FP4, served by a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mixedprec_plugin.evaluate.server import Server
from tests.server.conftest import chat, nearness

FOUR_SCHEMES = Path(__file__).with_name("experts.yaml")
WEIGHT_ONLY = Path(__file__).with_name("experts_weight_only.yaml")
NVFP4 = Path(__file__).with_name("experts_nvfp4.yaml")
MXFP4 = Path(__file__).with_name("experts_mxfp4.yaml")
# preset -> KL in nats a token, from the same weights dequantized by other code
LIMITS = {FOUR_SCHEMES: 0.01, WEIGHT_ONLY: 0.002, NVFP4: 0.002, MXFP4: 0.002}


@pytest.fixture(scope="module", params=LIMITS, ids=lambda preset: preset.stem)
def preset(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def server(
    experts_model: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp("experts") / "server.log"
    # experts of several schemes, weight-only: each rank runs two of the four of a layer
    flags = ["--tp", "2", "--ep-size", "2"] if preset == WEIGHT_ONLY else []
    with Server(experts_model, log_path, preset, flags) as server:
        yield server


def test_server_of_mixed_experts_answers_over_the_openai_api(server: Server) -> None:
    assert "Paris" in chat(server)


def test_distributions_of_mixed_experts_are_those_of_independently_dequantized_weights(
    server: Server, experts_model: Path, preset: Path, prose: str
) -> None:
    near = nearness(server, experts_model, preset, prose)
    assert near.divergence < LIMITS[preset]
    assert abs(near.loss) < 0.01
