"""One process that serves a preset and says what it holds; `benchmarks.before_and_after` runs it.

    python served_facts.py OUT MODEL PRESET [KEY=VALUE ...]

It imports nothing else of this folder: the mixedprec_plugin that lies beside it runs. It is
SGLang's correctness test of one batch, whose model and logits are looked at on the way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

# whose objects keep a module's weights
_KEEPERS = ("mixedprec_plugin.", "sglang.srt.layers.")


def digest(tensor: torch.Tensor) -> str:
    """Dtype, shape and SHA-256 of the elements, in order."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def model_facts(model: torch.nn.Module) -> dict[str, str]:
    """Digests of every parameter and buffer, and of what else modules keep, under any name."""
    named = (model.named_parameters, model.named_buffers)
    facts = {name: digest(x) for every in named for name, x in every(remove_duplicate=False)}
    known, seen = set(facts.values()), {id(model)}
    for name, module in model.named_modules():
        others = {digest(tensor) for tensor in _kept(vars(module), seen)} - known
        facts |= {f"{name} keeps {number}": x for number, x in enumerate(sorted(others))}
    return facts


def _kept(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that are reached from an object and not through another module."""
    if id(value) in seen:
        return
    seen.add(id(value))
    below: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        below = value.values()
    elif isinstance(value, list | tuple):
        below = value
    elif type(value).__module__.startswith(_KEEPERS) and not isinstance(value, torch.nn.Module):
        below = getattr(value, "__dict__", {}).values()
    for x in list(below):
        yield from _kept(x, seen)


def main(out: str, model: str, preset: str, *overrides: str) -> None:
    """Serve, write the facts as JSON, and end the process."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins

    load_plugins()
    load, extend = one_batch.load_model, one_batch.extend
    facts: dict[str, str] = {}
    calls = itertools.count()

    def load_and_look(*args: Any) -> Any:
        runner, tokenizer = load(*args)
        facts.update(model_facts(runner.torch_runner.model))
        return runner, tokenizer

    def extend_and_look(*args: Any) -> Any:
        tokens, logits, batch = extend(*args)
        facts[f"log-probabilities {next(calls)}"] = digest(torch.log_softmax(logits.float(), -1))
        return tokens, logits, batch

    one_batch.load_model, one_batch.extend = load_and_look, extend_and_look
    sys.argv = ["one_batch", "--correctness-test", "--model-path", model, "--output-len", "2"]
    sys.argv += ["--max-total-tokens", "2048", "--load-format", "mixedprec"]
    sys.argv += ["--mixedprec-config", preset]
    sys.argv += [word for override in overrides for word in ("--mixedprec-set", override)]
    one_batch.cli_main()
    Path(out).write_text(json.dumps(facts), encoding="utf-8")
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
