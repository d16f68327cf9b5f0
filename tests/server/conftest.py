"""A real server with every method in one model, shared by a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.server import Server

MIXED = Path(__file__).with_name("mixed.yaml")


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
    flags = ["--mixedprec-plan", str(plan_path)]
    with Server(widened_model, log_path, MIXED, flags) as server:
        yield Mixed(server, log_path, plan_path)


def greedy(server: Server, text: str, num_tokens: int = 16) -> list[int]:
    """Token ids that a server generates greedily."""
    answer = generate(server, text, max_new_tokens=num_tokens)
    return [int(entry[1]) for entry in answer["meta_info"]["output_token_logprobs"]]


def generate(server: Server, text: str, **sampling: Any) -> Any:
    """What /generate answers, with the log-probabilities of what it generated."""
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, **sampling},
        "return_logprob": True,
    }
    return server.request("/generate", body)
