"""A whole Llama through the plugin's loader, with another method in every layer."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import torch

from mixedprec_plugin.errors import MixedPrecisionError
from tests.dryrun.cards import Card
from tests.dryrun.cells import check_filled, class_name, nothing_of_ours
from tests.dryrun.fake_device import fake_card
from tests.dryrun.journal import JOURNAL
from tests.dryrun.layers import NUM_TOKENS
from tests.dryrun.methods import METHODS, Method
from tests.dryrun.rank import rank
from tests.presets import write_preset

_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclasses.dataclass
class WholeModel:
    """What became of a Llama.

    Attributes:
        runs_as: method -> classes of its layer's four modules.
        kernels: what a forward launches, in order, each once.
        refused, broken: as for a cell.
    """

    tp_size: int
    methods: list[str]
    runs_as: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    kernels: list[str] = dataclasses.field(default_factory=list)
    refused: str = ""
    broken: str = ""


def run_model(card: Card, methods: list[Method], tp_size: int, model: Path) -> WholeModel:
    """Load and run a Llama whose layer i runs in method i, of those that are given."""
    whole = WholeModel(tp_size, [method.title for method in methods])
    rules = [
        f'match: "model.layers.{index}.*_proj", {method.rule}'
        for index, method in enumerate(METHODS)
        if method in methods
    ]
    preset = write_preset(model.parent / f"{card.title}-{tp_size}", *rules)
    JOURNAL.clear()
    try:
        with rank(tp_size), fake_card():
            _run(whole, model, preset, card.dtype)
    except MixedPrecisionError as error:
        whole.refused = str(error)
    # whatever SGLang, torch or Triton raise is the result, and fails the test
    except Exception:  # noqa: BLE001
        whole.broken = traceback.format_exc()
    return whole


def _run(whole: WholeModel, folder: Path, preset: Path, dtype: str) -> None:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    class Loader(MixedPrecisionLoader):
        """Checks what was filled before SGLang repacks it."""

        @staticmethod
        def postprocess_weights(model: Any, target_device: Any) -> None:
            check_filled(model)
            MixedPrecisionLoader.postprocess_weights(model, target_device)

    settings = {"mixedprec_config": str(preset)}
    loader = Loader(LoadConfig(load_format="mixedprec", model_loader_extra_config=settings))
    model: Any = loader.load_model(
        model_config=ModelConfig(str(folder), dtype=dtype), device_config=DeviceConfig("cuda")
    )
    for index, method in enumerate(METHODS):
        if method.title in whole.methods:
            layer = model.model.layers[index]
            modules = [layer.get_submodule(name) for name in _PROJECTIONS]
            whole.runs_as[method.title] = [class_name(module) for module in modules]
    JOURNAL.take_kernels()
    _forward(model)
    whole.kernels = JOURNAL.take_kernels()


def _forward(model: Any) -> None:
    """From token ids to the last hidden states, past attention."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    tokens = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=NUM_TOKENS,
        input_ids=tokens,
        req_pool_indices=tokens,
        seq_lens=tokens,
        out_cache_loc=tokens,
        seq_lens_sum=NUM_TOKENS,
    )
    with nothing_of_ours():
        states = model.model(tokens, tokens, batch)
    assert states.shape == (NUM_TOKENS, 1024), states.shape


def record_norms_and_attention() -> None:
    """Stand in for the kernels of a whole model that are no part of the question."""
    import sgl_kernel.elementwise
    from sglang.srt.layers.radix_attention import RadixAttention

    sgl_kernel.elementwise._flashinfer_norm = _Norms()
    RadixAttention.forward = _attention


class _Norms:
    """flashinfer.norm, which compiles at its first use."""

    def rmsnorm(
        self, states: torch.Tensor, weight: torch.Tensor, *_rest: Any, **_keywords: Any
    ) -> torch.Tensor:
        """Normed states."""
        assert states.shape[-1] == weight.shape[0]
        JOURNAL.launch("flashinfer", "rmsnorm")
        return torch.empty_like(states)

    def fused_add_rmsnorm(
        self, states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *_rest: Any
    ) -> None:
        """In place."""
        assert states.shape == residual.shape
        assert states.shape[-1] == weight.shape[0]
        JOURNAL.launch("flashinfer", "fused_add_rmsnorm")


def _attention(
    _layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_rest: Any, **_keywords: Any
) -> torch.Tensor:
    assert q.shape[0] == k.shape[0] == v.shape[0]
    JOURNAL.launch("attention", "radix")
    return torch.empty_like(q)
