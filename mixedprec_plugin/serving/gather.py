"""Gathers what linear layers and experts read while a model is served, for `mixedprec search`.

SGLang calls `begin` in every rank by its own option --forward-hooks, once graphs are captured
(model_executor/hook_manager.py:11, model_runner_components/cuda_graph_setup.py:458). Hooks of
torch.nn.Module run where Python does: not in graphs. So prompts are what is gathered, and decoding
keeps its graphs; those of prefilling are refused, see `options`.

Every rank takes the same tokens of a pass, evenly spaced over it. The first of a sequence is none:
it is an attention sink, whose states are a thousand times as large as others'.

Between two norms that read the residual stream lies a branch, which adds to it. How much of the
stream behind a branch is the branch's tells how much an error in it matters.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel

from mixedprec_plugin.calibrate.gathered import metadata, model_digest, rank_path
from mixedprec_plugin.calibrate.sweep import save_whole
from mixedprec_plugin.errors import ConvertError, LoadError, Problem
from mixedprec_plugin.families.config import text_config
from mixedprec_plugin.serving.config import MixedPrecisionConfig
from mixedprec_plugin.serving.loader import served_config, served_model

logger = logging.getLogger(__name__)

# a prompt gives at most this part of the tokens, so that several are heard
_MAX_SHARE = 8
# written first with so many tokens, and again whenever they are twice as many
_FIRST_WRITE = 512
# between two tries to write
_RETRY_SECONDS = 60.0


_gathering: Gathering | None = None


def begin(said: Mapping[str, Any]) -> Callable[..., None]:
    """Begin to gather; see `options.ask_for_hooks`.

    It is called for a draft model, too, of which nothing is gathered.

    Raises:
        LoadError: the folder cannot be written.
    """
    global _gathering
    if _gathering is None:
        model = served_model()
        _gathering = Gathering(model, served_config(model), **said)
    return lambda *_: None


class Gathering:
    """Hooks on the modules of a model, until each has seen its tokens.

    Raises:
        LoadError: the folder cannot be written.
    """

    def __init__(
        self, model: torch.nn.Module, config: MixedPrecisionConfig, folder: str, num_tokens: int
    ) -> None:
        self._plan, self._num_tokens = config.plan, num_tokens
        self._path = rank_path(Path(folder), get_parallel().tp_rank, get_parallel().pp_rank)
        try:
            # whoever reads the inputs of a first layer reads the prompts
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
        except OSError as error:
            what = f"{folder!r} cannot be written ({error.strerror})"
            remedy = "name another folder"
            raise LoadError(Problem("--mixedprec-inputs", what, remedy, "write")) from error
        self._facts = {
            "model": model_digest(self._plan), "path": str(self._plan.source.path),
            "tp_size": get_parallel().tp_size, "pp_size": get_parallel().pp_size,
        }  # fmt: skip
        self._modules = {
            name: module
            for name, module in config.built.items()
            if not isinstance(module, ParallelLMHead)
        }
        self._seen: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._counts = dict.fromkeys(self._modules, 0)
        self._count, self._next_write, self._not_before = 0, min(_FIRST_WRITE, num_tokens), 0.0
        # of the pass that runs: which of how many tokens; the stream, [T, hidden size]; and the
        # modules of the branch that runs
        self._rows, self._num_rows = torch.empty(0, dtype=torch.int64), 0
        self._stream: torch.Tensor | None = None
        self._branch: list[str] = []
        # of each module: sums of squares of what its branch adds, and of the stream behind it
        self._sums: dict[str, torch.Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(functools.partial(self._see, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        size = text_config(self._plan.source.config).get("hidden_size")
        self._handles += [
            module.register_forward_pre_hook(self._see_stream, with_kwargs=True)
            for module in model.modules()
            if {tuple(x.shape) for x in module.parameters(recurse=False)} == {(size,)}
        ]
        built = {id(module) for module in self._modules.values()}
        for child in model.children():
            if any(id(module) in built for module in child.modules()):
                self._handles += [
                    child.register_forward_pre_hook(self._start_pass, with_kwargs=True),
                    child.register_forward_hook(self._end_pass),
                ]

    def _start_pass(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._rows, self._stream, self._branch = self._rows[:0], None, []
        batch = next((x for x in (*args, *kwargs.values()) if isinstance(x, ForwardBatch)), None)
        if batch is None or not batch.forward_mode.is_extend():
            return
        behind_first = (batch.positions > 0).nonzero().flatten()
        count = min(
            len(behind_first), -(-self._num_tokens // _MAX_SHARE), self._num_tokens - self._count
        )
        spaced = torch.linspace(0, len(behind_first) - 1, count, device=behind_first.device)
        self._rows, self._num_rows = behind_first[spaced.round().long()], len(batch.positions)
        self._count += count

    def _see(
        self, name: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Keep the tokens of one module's inputs, in the memory of the CPU."""
        if not len(self._rows):
            return
        given = [*args, *kwargs.values()]
        x, experts = given[0], None
        if isinstance(module, FusedMoE):
            experts = getattr(given[1], "topk_ids", None)
            if experts is None:
                return  # chosen in the experts' own kernel
            experts = experts[self._rows].to("cpu", torch.int32)
        if isinstance(x, torch.Tensor) and x.dim() == 2 and len(x) == self._num_rows:
            kept = x[self._rows].to("cpu", torch.bfloat16)
            self._seen.setdefault(name, []).append((kept, experts))
            self._counts[name] += len(kept)
            self._branch.append(name)

    def _see_stream(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Close a branch at a norm, which in SGLang takes what was added and the stream before."""
        x, residual = [*args, *kwargs.values(), None, None][:2]
        if not len(self._rows):
            return
        if not isinstance(x, torch.Tensor) or len(x) != self._num_rows:
            self._stream, self._branch = None, []
            return
        stream = x[self._rows].float()
        if residual is not None:
            stream += residual[self._rows].float()
        elif self._stream is not None:
            return  # it reads something else
        if self._stream is not None:
            pair = torch.stack([y.square().sum() for y in (stream - self._stream, stream)])
            for name in self._branch:
                self._sums[name] = self._sums[name] + pair if name in self._sums else pair
        self._stream, self._branch = stream, []

    def _end_pass(self, *_: object) -> None:
        self._rows = self._rows[:0]
        if self._count < self._next_write or time.monotonic() < self._not_before:
            return
        try:
            self._write()
        except ConvertError as error:
            # users are served meanwhile, and what was gathered is kept
            self._not_before = time.monotonic() + _RETRY_SECONDS
            logger.error("mixedprec: gathered inputs: %s; tried again in a minute", error)
            return
        self._next_write = min(2 * self._count, self._num_tokens)
        if self._count == self._num_tokens:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._seen.clear()

    def _write(self) -> None:
        whole = [name for name, count in self._counts.items() if count == self._count]
        tensors: dict[str, torch.Tensor] = {}
        for name in whole:
            pieces = self._seen[name] = [_joined(self._seen[name])]
            x, experts = pieces[0]
            stored = self._plan.modules[name][0].stored
            assert stored is not None
            if get_parallel().tp_rank and x.shape[1] == stored.K:
                continue  # what the first rank has, too
            tensors[f"{name}.x"] = x
            if experts is not None:
                tensors[f"{name}.experts"] = experts
        facts = {
            **self._facts, "made": time.time_ns(), "num_tokens": self._count,
            "modules": [name for name in whole if f"{name}.x" in tensors],
            "unseen": sorted(self._modules.keys() - whole),
            "shares": {name: float(sums[0] / sums[1]) for name, sums in self._sums.items()},
        }  # fmt: skip
        save_whole(tensors, self._path, metadata(facts))
        if get_parallel().tp_rank == 0:
            logger.info(
                "mixedprec: %s: what %d modules read of %d tokens%s",
                self._path, len(whole), self._count,
                "; no more are gathered" if self._count == self._num_tokens else "",
            )  # fmt: skip


def _joined(
    pieces: list[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    experts = [ids for _, ids in pieces if ids is not None]
    return torch.cat([x for x, _ in pieces]), torch.cat(experts) if experts else None
