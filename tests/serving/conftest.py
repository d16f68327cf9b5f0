"""SGLang in this process: plugins loaded, a context for one rank, no process group."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.checkpoints import write_llama
from tests.serving.stock import load

LoadModel = Callable[..., "object"]


@pytest.fixture(scope="session")
def sglang_context() -> SimpleNamespace:
    """The plugin registered as a server would, and SGLang's context published for one rank."""
    with warnings.catch_warnings():
        # SGLang warns at import that AWQ and GGUF need a GPU
        warnings.simplefilter("ignore")
        from sglang.srt.plugins import load_plugins

        load_plugins()
        # all of its models: it passes over those whose imports fail
        import sglang.srt.models.registry  # noqa: F401
        from sglang.srt.runtime_context import get_context, get_parallel

        import mixedprec_plugin.serving.loader  # noqa: F401
    get_context().override_server_args(tp_size=1, device="cpu").install()
    group = SimpleNamespace(
        rank_in_group=0,
        world_size=1,
        cpu_group=None,
        device_group=None,
        is_first_rank=True,
        is_last_rank=True,
    )
    get_parallel().override_permanently(
        tp_rank=0, attn_tp_rank=0, moe_tp_rank=0, moe_ep_rank=0, pp_rank=0, attn_dp_rank=0,
        attn_cp_rank=0, moe_dp_rank=0, attn_dcp_rank=0, tp_group=group, attn_tp_group=group,
        moe_tp_group=group, moe_ep_group=group, pp_group=group,
    )  # fmt: skip
    return SimpleNamespace(context=get_context())


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
