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
# preset -> KL in nats a token, and difference in loss, from the same weights dequantized by other
# code, which does not round router weights as Marlin does; measured for MXFP4:
# 0.00207 and 0.0102.
LIMITS = {
    FOUR_SCHEMES: (0.01, 0.01),
    WEIGHT_ONLY: (0.002, 0.01),
    NVFP4: (0.002, 0.01),
    MXFP4: (0.0025, 0.015),
}


@pytest.fixture(scope="module", params=LIMITS, ids=lambda preset: preset.stem)
def preset(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def server(
    experts_model: Path, preset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp("experts") / "server.log"
    with Server(experts_model, log_path, preset) as server:
        yield server


def test_server_of_mixed_experts_answers_over_the_openai_api(server: Server) -> None:
    assert "Paris" in chat(server)


def test_distributions_of_mixed_experts_are_those_of_independently_dequantized_weights(
    server: Server, experts_model: Path, preset: Path, prose: str
) -> None:
    near = nearness(server, experts_model, preset, prose)
    divergence, loss = LIMITS[preset]
    assert near.divergence < divergence
    assert abs(near.loss) < loss
