"""What the layers of a served model read, as files: gathered in the engine, for `mixedprec search`.

Each rank writes one file. In it are, for each module that read as many tokens as were gathered,
`{module}.x`, bfloat16 [T, K], and of experts `{module}.experts`, int32 [T, k], which of them each
token went to. All modules and ranks have the same tokens, in one order. A layer whose inputs are
split over tensor-parallel ranks has its own columns in each rank's file; others are in the first's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.compose.stream import compose_floats
from mixedprec_plugin.errors import CheckpointError, Problem
from mixedprec_plugin.plan.folding import natural_key
from mixedprec_plugin.plan.model import Plan

VERSION = 1
# of so many blocks of so many tokens, the last one is held out
_BLOCKS, _BLOCK_TOKENS = 5, 64
MIN_TOKENS = _BLOCKS * _BLOCK_TOKENS
_KEY = "gathered"


class Tokens(NamedTuple):
    """What a module read.

    Attributes:
        x: bfloat16 [T, K].
        experts: int32 [T, k], which experts each token went to; None of a linear layer.
    """

    x: torch.Tensor
    experts: torch.Tensor | None


def rank_path(folder: Path, tp_rank: int, pp_rank: int) -> Path:
    """Where a rank writes."""
    return folder / f"inputs-tp{tp_rank}-pp{pp_rank}.safetensors"


def model_digest(plan: Plan) -> str:
    """A digest of a model's norms, in front of which nothing that may be quantized is scaled.

    A release that is quantized keeps those of the model that it was made from, or else its layers
    read something else.
    """
    made = hashlib.sha256()
    norms = [layer for layer in plan.layers if layer.kind == "norm"]
    with Reader() as reader:
        for layer in sorted(norms, key=lambda layer: natural_key(layer.name)):
            for suffix, tensor in sorted(compose_floats(layer, plan.target, reader).items()):
                made.update(f"{layer.name}.{suffix}".encode())
                made.update(tensor.bfloat16().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of a file as safetensors has them."""
    return {_KEY: json.dumps({"version": VERSION, **facts})}


class Gathered:
    """The files of a folder where an engine wrote, whole and of one model, that of a plan.

    Raises:
        CheckpointError: there are none, some are missing or damaged, they are of another model, or
            there are too few tokens.
    Attributes:
        facts: what each file says of itself.
        num_tokens: of each module.
        unseen: modules that the engine built and whose inputs it did not see.
        shares: module -> how much of the residual stream behind its branch of the decoder layer
            that branch added, 0 to 1 or a little more; empty where it is not known of each module.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self._plan = folder, plan
        # by number: columns are put together in this order
        self._paths = sorted(
            folder.glob("inputs-tp*-pp*.safetensors"), key=lambda path: natural_key(path.name)
        )
        if not self._paths:
            raise self._wrong("holds no inputs that an engine gathered", _SERVE)
        self.facts = [self._facts(path) for path in self._paths]
        first = self.facts[0]
        self.num_tokens: int = first["num_tokens"]
        self.unseen = frozenset(name for facts in self.facts for name in facts["unseen"])
        self._check(first)
        shares = {name: x for facts in self.facts for name, x in facts["shares"].items()}
        seen = {name for facts in self.facts for name in facts["modules"]}
        self.shares: dict[str, float] = shares if seen <= shares.keys() else {}

    def _facts(self, path: Path) -> dict[str, Any]:
        with self._opened(path) as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if facts.get("version") != VERSION:
            what = f"{path.name} is of version {facts.get('version')} (expected {VERSION})"
            raise self._wrong(what, "gather them again")
        return facts

    def _check(self, first: Mapping[str, Any]) -> None:
        num_tp, num_pp = first["tp_size"], first["pp_size"]
        expected = [rank_path(self.folder, tp, pp) for tp in range(num_tp) for pp in range(num_pp)]
        if self._paths != expected:
            missing = [x.name for x in expected if x not in self._paths]
            more = [x.name for x in self._paths if x not in expected]
            what = f"is of {num_tp} tensor-parallel ranks in {num_pp} stages"
            what += f", and {', '.join(missing)} is missing" if missing else ""
            what += f", and {', '.join(more)} is of another start" if more else ""
            raise self._wrong(what, "copy every rank's file, or gather into an empty folder")
        counts = sorted({facts["num_tokens"] for facts in self.facts})
        if len(counts) > 1:
            what = f"has files of {' and '.join(map(str, counts))} tokens (expected one number)"
            raise self._wrong(what, "wait until every rank has written")
        if first["model"] != model_digest(self._plan):
            what = f"was gathered from {first['path']}, whose norms are others than this model's"
            raise self._wrong(what, "name the model that was served, or what it was made from")
        if self.num_tokens < MIN_TOKENS:
            what = f"has {self.num_tokens} tokens (expected {MIN_TOKENS} or more)"
            raise self._wrong(what, "send the server more prompts")

    def has(self, module: str) -> bool:
        """Whether the inputs of a module are there; an error where no file knows of it."""
        if module in self.unseen:
            return False
        if not any(module in facts["modules"] for facts in self.facts):
            what = f"knows no {module}, which the model has"
            raise self._wrong(what, "name the model that was served, or what it was made from")
        return True

    def is_held_out(self) -> torch.Tensor:
        """Which tokens candidates are scored on, bool [T]; they are made with the others."""
        blocks = torch.arange(self.num_tokens) // _BLOCK_TOKENS
        return blocks % _BLOCKS == _BLOCKS - 1

    def tokens(self, module: str, K: int) -> Tokens:
        """What a module of K inputs read."""
        parts: list[torch.Tensor] = []
        experts = None
        for path, facts in zip(self._paths, self.facts, strict=True):
            if module in facts["modules"]:
                with self._opened(path) as file:
                    parts.append(file.get_tensor(f"{module}.x"))
                    if f"{module}.experts" in file.keys():  # noqa: SIM118
                        experts = file.get_tensor(f"{module}.experts")
        x = torch.cat(parts, 1)
        if x.shape[1] != K:
            what = f"has {x.shape[1]} inputs of {module} (expected {K})"
            raise self._wrong(what, "name the model that was served, or what it was made from")
        return Tokens(x, experts)

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError, ValueError) as error:
            what = f"{path.name} cannot be read ({error})"
            raise self._wrong(what, "gather them again") from error

    def _wrong(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(Problem(str(self.folder), what, remedy, "gathered"))


_SERVE = "serve the model with --load-format mixedprec --mixedprec-inputs FOLDER, and send prompts"
