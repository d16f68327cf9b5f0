"""SGLang in this process: plugins loaded, a context for one rank, no process group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.checkpoints import write_llama
from tests.serving.stock import load

LoadModel = Callable[..., "object"]


@pytest.fixture(scope="session")
def sglang_context() -> Iterator[SimpleNamespace]:
    """The plugin registered as a server would, and SGLang's context published for one rank."""
    with warnings.catch_warnings():
        # SGLang warns at import that AWQ and GGUF need a GPU
        warnings.simplefilter("ignore")
        from sglang.srt.plugins import load_plugins

        load_plugins()
        # all of its models: it passes over those whose imports fail
        import sglang.srt.models.registry  # noqa: F401
        from sglang.srt.runtime_context import get_context

        import mixedprec_plugin.serving.loader  # noqa: F401
        from mixedprec_plugin.serving.alone import one_rank
    with one_rank(""):
        yield SimpleNamespace(context=get_context())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def load_model(sglang_context: SimpleNamespace) -> LoadModel:
    """Load a checkpoint with a preset, by the loader itself and SGLang's own model class."""

    def load_with_preset(
        model: Path, preset: Path, dtype: str = "bfloat16", **extra: object
    ) -> object:
        said = {"mixedprec_config": str(preset), **extra}
        return load(model, dtype, load_format="mixedprec", model_loader_extra_config=said)

    return load_with_preset


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's classes for Marlin construct where a GPU has compute capability 8.0."""
    from sglang.srt.layers.quantization import marlin_utils

    monkeypatch.setattr(marlin_utils, "get_device_capability", lambda *_: (9, 0))
