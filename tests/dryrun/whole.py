"""A whole model through the plugin's loader: built, filled, repacked, run past attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.dryrun.cards import Card
from tests.dryrun.cells import check_filled, nothing_of_ours
from tests.dryrun.fake_device import fake_card
from tests.dryrun.journal import JOURNAL, outcome
from tests.dryrun.layers import NUM_TOKENS
from tests.dryrun.rank import rank

# zero points of GPTQ's experts, which no kernel reads; biases of unquantized experts, and routers,
# which the model may keep in float32
_CAST = ("_qzeros", "_weight_bias", ".gate.weight", "e_score_correction_bias")


@dataclasses.dataclass
class WholeModel:
    """What became of a model.

    Attributes:
        name: of the family.
        mix: what its layers run in, in a word.
        runs_as: module -> class of its quantization method; of a composite, of each group's.
        kernels: what a forward launches, in order, each once.
        refused, broken, made_up: as for a cell.
        setting: environment variable that was set for it.
    """

    name: str
    mix: str
    tp_size: int
    runs_as: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    kernels: list[str] = dataclasses.field(default_factory=list)
    refused: str = ""
    broken: str = ""
    made_up: list[str] = dataclasses.field(default_factory=list)
    setting: str = ""


def run(
    whole: WholeModel,
    card: Card,
    folder: Path,
    preset: Path,
    inspect: Callable[[Any], dict[str, list[str]]],
) -> WholeModel:
    """Load a model and run it; what becomes of it is written into `whole`.

    Args:
        folder: of the checkpoint.
        inspect: the loaded model -> `runs_as`.
    """
    with outcome(partial(setattr, whole)), rank(whole.tp_size), fake_card():
        model = load(folder, preset, card)
        whole.runs_as = inspect(model)
        JOURNAL.take_kernels()
        forward(model)
        whole.kernels = JOURNAL.take_kernels()
        forward_in_prefill_graph(model)
        in_graph = JOURNAL.take_kernels()
        assert sorted(in_graph) == sorted(whole.kernels), in_graph
        whole.made_up = sorted(set(JOURNAL.made_up))
    return whole


def load(folder: Path, preset: Path, card: Card) -> Any:
    """Load a model with a preset, and check that every parameter is filled before repacking."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader

    class Loader(MixedPrecisionLoader):
        """Checks what was filled before SGLang repacks it."""

        @staticmethod
        def postprocess_weights(model: Any, target_device: Any) -> None:
            check_filled(model, *_CAST)
            MixedPrecisionLoader.postprocess_weights(model, target_device)

    settings = {"mixedprec_config": str(preset)}
    loader = Loader(LoadConfig(load_format="mixedprec", model_loader_extra_config=settings))
    return loader.load_model(
        model_config=ModelConfig(str(folder), dtype=card.dtype),
        device_config=DeviceConfig("cuda"),
    )


def forward_in_prefill_graph(model: Any) -> None:
    """The same as SGLang records it for prefilling: some layers then ask the model's config.

    Source: `set_tc_piecewise_forward_context` (runner_backend_utils/tc_piecewise_cuda_graph/).
    """
    from sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph import (
        set_tc_piecewise_forward_context,
    )

    config = model.quant_config
    with set_tc_piecewise_forward_context(None, [], config, [], []):
        forward(model)


def forward(model: Any) -> None:
    """From token ids to the last hidden states, past attention."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

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
    # keys and values are not cached
    backend: Any = SimpleNamespace(
        prefill_attention_backend_str="triton",
        decode_attention_backend_str="triton",
        token_to_kv_pool=SimpleNamespace(dtype=None),
    )
    is_composite = any(hasattr(module, "expert_groups") for module in model.modules())
    watched = contextlib.nullcontext() if is_composite else nothing_of_ours()
    with forward_context(ForwardContext(backend)), watched:
        states = model.model(tokens, tokens, batch)
    width = model.model.embed_tokens.embedding_dim
    assert states.shape == (NUM_TOKENS, width), states.shape
