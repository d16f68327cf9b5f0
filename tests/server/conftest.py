"""A real server with every method in one model, shared by a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.reference_model import load_reference, windowed_log_probabilities
from benchmarks.rounding import round_as_kernels
from mixedprec_plugin.evaluate.engine import WINDOW, distributions
from mixedprec_plugin.evaluate.server import Server

MIXED = Path(__file__).with_name("mixed.yaml")
# of the prose that distributions are compared on
NUM_TOKENS = 200
API_KEY = "open sesame"


@dataclasses.dataclass
class Mixed:
    """The running server and where it wrote its log and its plan."""

    server: Server
    log_path: Path
    plan_path: Path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread a rank: two that wait for each other crawl when a neighbour takes a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def mixed(widened_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    log_path, plan_path = folder / "server.log", folder / "plan.json"
    flags = ["--mixedprec-plan", str(plan_path), "--enable-metrics"]
    with Server(widened_model, log_path, MIXED, flags, api_key=API_KEY) as server:
        yield Mixed(server, log_path, plan_path)


def greedy(server: Server, text: str, num_tokens: int = 16) -> list[int]:
    """Token ids that a server generates greedily."""
    answer = generate(server, text, max_new_tokens=num_tokens)
    return [int(entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]]


def generate(server: Server, text: str, **sampling: Any) -> Any:
    """What /generate answers, with the log-probabilities of what it generated.

    Nothing is cached: what one scale a tensor makes of activations depends on the tokens beside.
    """
    server.flush_cache()
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, **sampling},
        "return_logprob": True,
    }
    return server.request("/generate", body)


def chat(server: Server) -> str:
    """What the server answers to a question, over the OpenAI API."""
    question = "What is the capital of France? Answer in one sentence."
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 20,
    }
    answer = server.request("/v1/chat/completions", body)
    content: str = answer["choices"][0]["message"]["content"]
    return content


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How far a server is from independently dequantized weights.

    Attributes:
        divergence: mean KL(reference || server) a token, in nats.
        loss: mean of reference minus server, of the log-probabilities of the text.
    """

    divergence: float
    loss: float


def nearness(server: Server, model: Path, preset: Path, text: str) -> Nearness:
    """Compare a server's distributions over a text with those of transformers."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:NUM_TOKENS]
    reference, _ = load_reference(model, preset, torch.bfloat16)
    round_as_kernels(reference)
    expected = windowed_log_probabilities(reference, tokens, WINDOW)
    served = np.concatenate([rows for _, rows in distributions(server, tokens, expected.shape[1])])
    difference = expected - torch.from_numpy(served)
    chosen = difference.gather(1, torch.tensor(tokens[1:])[:, None])
    return Nearness(float((expected.exp() * difference).sum(-1).mean()), float(chosen.mean()))
