"""What only a loaded layer shows: whether it takes new weights, as per-channel FP8's do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixedprec_plugin.errors import LoadError
from mixedprec_plugin.methods.construct import build_config
from mixedprec_plugin.methods.registry import bind

pytestmark = pytest.mark.usefixtures("sglang_context")


def config(name: str = "fp8_channel", device: str = "cuda") -> Any:
    return build_config(*bind(name, {}), device, capability=90)


def layer(of: Any) -> Any:
    """One of SGLang's linear layers, square, loaded and processed."""
    from sglang.srt.layers.linear import ColumnParallelLinear

    made = ColumnParallelLinear(
        128, 128, bias=False, params_dtype=torch.bfloat16, quant_config=of, prefix="x"
    )
    made.quant_method.process_weights_after_loading(made)
    return made


def test_weights_that_sglang_turned_around_are_not_written_over() -> None:
    from mixedprec_plugin.serving.late import check_reloadable

    message = (
        r"model.layers.0-1.mlp.down_proj: takes no new weights: W8A8Fp8LinearMethod gave its "
        r"weight another form after it was loaded; restart the server with them"
    )
    built = {f"model.layers.{n}.mlp.down_proj": layer(config()) for n in range(2)}
    with pytest.raises(LoadError, match=message):
        check_reloadable(built)


def test_weights_that_keep_their_loaders_are() -> None:
    from mixedprec_plugin.serving.late import check_reloadable

    check_reloadable({"a": layer(config(device="cpu")), "b": layer(None)})


def test_a_method_that_restores_its_weights_is_trusted() -> None:
    from mixedprec_plugin.serving.late import check_reloadable

    class Restoring:
        def restore_weights_before_loading(self, _layer: object) -> None:
            """As AWQ's and GPTQ's have it."""

    made = layer(config())
    made.quant_method = Restoring()
    check_reloadable({"a": made})


def test_update_from_disk_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mixedprec_plugin.serving import loader

    served = SimpleNamespace(
        built={"a": layer(config())}, plan=SimpleNamespace(target=SimpleNamespace(device="cuda"))
    )
    loaded = loader.Loaded(loader.Settings(), served, *[SimpleNamespace()] * 2)  # type: ignore[arg-type]
    monkeypatch.setattr(loader, "_loaded", loaded)
    made = object.__new__(loader.MixedPrecisionLoader)
    made._has_opened_new_path = False
    of = SimpleNamespace(is_draft_model=False)
    source = SimpleNamespace(model_config=of, model_or_path="nowhere", revision=None)
    with pytest.raises(LoadError, match="a: takes no new weights"):
        made._get_weights_iterator(source)  # type: ignore[arg-type]
