"""`mixedprec cache`."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest

from mixedprec_plugin.cli.main import main
from mixedprec_plugin.compose.cache import LayerCache, cache_folder
from mixedprec_plugin.compose.parts import compose_parts
from mixedprec_plugin.compose.stream import VirtualCheckpoint
from tests.checkpoints import write_llama
from tests.presets import plan


def run(*words: str) -> str:
    out = io.StringIO()
    assert main(["cache", *words], out) == 0
    return out.getvalue()


def test_what_is_kept_is_listed_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXEDPREC_CACHE", str(tmp_path))
    assert run("list").endswith(f"in {tmp_path / 'layers'}\n")
    model = write_llama(tmp_path / "model", num_hidden_layers=1)
    made = plan(model, 'match: "*.mlp.*", method: awq, group_size: 64')
    cache = LayerCache(cache_folder(), 1 << 30, made.source.facts)
    for _, tensor in VirtualCheckpoint(made, compose=functools.partial(compose_parts, cache=cache)):
        tensor.clone()
    told = json.loads(run("list", "--json"))
    assert told["layers"] == [
        {
            "model": str(model),
            "scheme": "awq 4-bit g64",
            "entries": 3,
            "bytes": sum(path.stat().st_size for path in cache.folder.glob("??/*")),
        }
    ]
    assert "awq 4-bit g64" in run("list")
    assert run("clear").startswith("deleted ")
    assert json.loads(run("list", "--json"))["layers"] == []
