"""One process that loads a model with both loaders in turn, and says how long each took.

    python -m benchmarks.loading.loads MODEL PRESET REPETITIONS

It is SGLang's one-batch benchmark up to the point where a model is loaded: distributed state,
configs and platform are the engine's.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loading.cache import make_cold, make_warm
from benchmarks.memory import resident

MARK = "LOAD "


@dataclasses.dataclass(frozen=True)
class Load:
    """One load.

    Attributes:
        loader: `stock` or `mixedprec`.
        cache: `cold` or `warm`: whether the files were in the page cache.
        seconds: by the clock.
        cpu_seconds: of all threads.
        peak: bytes by which resident memory rose at most, mapped files included.
        model: bytes of the model's parameters.
    """

    loader: str
    cache: str
    seconds: float
    cpu_seconds: float
    peak: int
    model: int


def main(model: str, preset: str, repetitions: str) -> None:
    """Load and print; the process ends where SGLang would go on."""
    from sglang.benchmark import one_batch
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sys.argv = ["one_batch", "--model-path", model, "--max-total-tokens", "2048"]
    sys.argv += ["--batch-size", "1", "--input-len", "8", "--output-len", "2"]
    sys.argv += ["--skip-tokenizer-init"]
    stock = DefaultModelLoader.load_model

    def load(self: Any, *, model_config: Any, device_config: Any) -> Any:
        DefaultModelLoader.load_model = stock
        folders = [Path(model), Path(model).parent / "other"]
        files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]

        def run(name: str, make: Callable[[], Any], cache: str) -> None:
            (make_cold if cache == "cold" else make_warm)(files)
            result = _measure(name, make(), cache, copy.deepcopy(model_config), device_config)
            print(f"\n{MARK}{json.dumps(dataclasses.asdict(result))}", flush=True)

        loaders = {"stock": _stock_loader, "mixedprec": lambda: _own_loader(preset)}
        for cache in ("warm", "cold"):
            for repetition in range(int(repetitions)):
                # whoever goes first may find memory in another state
                names = sorted(loaders, reverse=repetition % 2 == 0)
                for name in names:
                    run(name, loaders[name], cache)
        os._exit(0)

    DefaultModelLoader.load_model = load
    one_batch.cli_main()


def _stock_loader() -> Any:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    return DefaultModelLoader(LoadConfig(load_format="auto"))


def _own_loader(preset: str) -> Any:
    from sglang.srt.configs.load_config import LoadConfig

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    extra = json.dumps({"mixedprec_config": preset})
    config = LoadConfig(load_format=MixedPrecisionLoader, model_loader_extra_config=extra)
    return MixedPrecisionLoader(config)


def _measure(name: str, loader: Any, cache: str, model_config: Any, device_config: Any) -> Load:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    model = loader.load_model(model_config=model_config, device_config=device_config)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resident("VmHWM") - before
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in model.parameters()}
    size = sum(storage.nbytes() for storage in storages.values())
    return Load(name, cache, seconds, cpu_seconds, peak, size)


if __name__ == "__main__":
    main(*sys.argv[1:])
