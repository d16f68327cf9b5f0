"""Experts of one layer in four schemes, served by a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.engine_logprobs import distributions
from benchmarks.reference_model import load_reference, log_probabilities
from benchmarks.rounding import round_as_kernels
from demo.server import Server

EXPERTS = Path(__file__).with_name("experts.yaml")
NUM_TOKENS = 200


@pytest.fixture(scope="module")
def server(experts_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log_path = tmp_path_factory.mktemp("experts") / "server.log"
    with Server(experts_model, log_path, EXPERTS) as server:
        yield server


def test_server_of_mixed_experts_answers_over_the_openai_api(server: Server) -> None:
    body = {
        "model": "default",
        "messages": [
            {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
        ],
        "temperature": 0,
        "max_tokens": 20,
    }
    answer = server.request("/v1/chat/completions", body)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_distributions_of_mixed_experts_are_those_of_independently_dequantized_weights(
    server: Server, experts_model: Path, prose: str
) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(experts_model)(prose)["input_ids"][:NUM_TOKENS]
    reference, _ = load_reference(experts_model, EXPERTS, torch.bfloat16)
    round_as_kernels(reference)
    expected = log_probabilities(reference, tokens)
    served = np.concatenate([rows for _, rows in distributions(server, tokens, expected.shape[1])])
    difference = expected - torch.from_numpy(served)
    divergence = (expected.exp() * difference).sum(-1)
    assert float(divergence.mean()) < 0.01
    chosen = difference.gather(1, torch.tensor(tokens[1:])[:, None])
    assert abs(float(chosen.mean())) < 0.01
