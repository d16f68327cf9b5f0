"""Decode speed of every shipped preset on a real GPU, beside the unquantized model's.

Several servers run at once, as many as the GPU holds, and decode one after another, in rounds: what
slows the machine for a while then slows all of them.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mixedprec_plugin.evaluate.server import Server
from tests.gpu.card import PRESETS, flags, preset_plan, why_not
from tests.gpu.speed import decode_speed
from tests.gpu.test_presets import NAMES

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
_STOCK = "(bf16, no preset)"
_ROUNDS = 3
_BATCH_SIZES = (1, 32)
# a context, its graphs, the demo model and its cache
_SERVER_BYTES = 6 * 2**30
_SMALL = ["--mem-fraction-static", "0.5", "--max-total-tokens", "32768", "--sleep-on-idle"]

Speeds = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def speeds(gpu: int, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Speeds:
    """Tokens a second by preset and batch size, each the median of the rounds."""
    names = [_STOCK]
    names += [name for name in NAMES if not why_not(preset_plan(name, demo_model, gpu), gpu)]
    at_once = max(1, torch.cuda.mem_get_info()[0] // _SERVER_BYTES)
    folder = tmp_path_factory.mktemp("servers")
    found: Speeds = {}
    for start in range(0, len(names), at_once):
        with _running(names[start : start + at_once], demo_model, folder) as servers:
            found |= _measure(servers)
    return found


@contextlib.contextmanager
def _running(names: list[str], model: Path, folder: Path) -> Iterator[dict[str, Server]]:
    """Start servers at once, and stop them all in the end."""

    def start(name: str) -> Server:
        preset = None if name == _STOCK else PRESETS / f"{name}.yaml"
        server = Server(model, folder / f"{name.split()[0]}.log", preset, [*flags(), *_SMALL])
        return server.__enter__()

    # a server ends with the thread that started it
    with ThreadPoolExecutor(len(names)) as pool:
        started = {name: pool.submit(start, name) for name in names}
        try:
            yield {name: future.result() for name, future in started.items()}
        finally:
            for future in started.values():
                if future.exception() is None:
                    future.result().stop()


def _measure(servers: dict[str, Server]) -> Speeds:
    rounds = [
        {name: {n: decode_speed(server, n) for n in _BATCH_SIZES} for name, server in items}
        for items in [list(servers.items())] * _ROUNDS
    ]
    return {
        name: {n: statistics.median(found[name][n] for found in rounds) for n in _BATCH_SIZES}
        for name in servers
    }


@pytest.mark.parametrize("preset", NAMES)
def test_decode_speed(preset: str, speeds: Speeds, report: list[str]) -> None:
    if preset not in speeds:
        pytest.skip(f"this GPU does not run {preset}")
    parts = [
        f"{speeds[preset][n]:,.0f} tokens/s at batch {n} "
        f"({speeds[preset][n] / speeds[_STOCK][n]:.2f} of unquantized)"
        for n in _BATCH_SIZES
    ]
    report.append(f"{preset}: " + ", ".join(parts))
    assert speeds[preset][32] > speeds[preset][1]
