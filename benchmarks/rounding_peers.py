"""Other tools that round to 4 bits, calibrated on text that the model wrote.

Each runs in an environment of its own below the cache, see benchmarks/third_party. `python -m
benchmarks.rounding_peers` installs them; the benchmark takes those that are there, and waits for
each for MINUTES at most.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.third_party.environments import is_installed, python_of, run_module
from benchmarks.third_party.recipes import AUTO_ROUND, AUTOAWQ, GPTQMODEL, LLMCOMPRESSOR, Tool
from mixedprec_plugin.calibrate import LENGTH
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.text import write_text
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_resolved

AWQ, GPTQ = "awq, groups of 64", "gptq, groups of 64"
# pieces of text that they are given, of 128 tokens; and how long each may take
TEXT_WINDOWS, MINUTES = 16, 60


class PeerError(Exception):
    """A tool made no checkpoint."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A tool, and the layout that it writes.

    Attributes:
        title: what it is called in the table.
        preset: the preset of the same layout and size.
        arguments: of its script in benchmarks/third_party.
    """

    title: str
    preset: str
    tool: Tool
    arguments: Mapping[str, Any]

    def is_installed(self) -> bool:
        """Whether its environment is there."""
        return is_installed(self.tool)

    def make(self, model: Path, folder: Path) -> Path:
        """The folder of its checkpoint, made if it is not there.

        Raises:
            PeerError: it failed, or was not ready in time.
        """
        out = folder / self.tool.name
        if out.exists():
            return out
        staging, log = folder / f"{self.tool.name}.tmp", folder / f"{self.tool.name}.log"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        arguments = {**self.arguments, "group_size": 64, "text": str(_text(model, folder))}
        words = [str(model), str(staging), json.dumps(arguments)]
        try:
            run_module(self.tool, f"quantize_{self.tool.script}", words, log, 60 * MINUTES)
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"not finished in {MINUTES} minutes") from error
        except subprocess.CalledProcessError as error:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
            raise PeerError(f"failed ({last[:200]})") from error
        return staging.rename(out)


PEERS = (
    Peer("AutoAWQ", AWQ, AUTOAWQ, {}),
    Peer("auto-round's AWQ", AWQ, AUTO_ROUND, {"fold": True}),
    Peer("GPTQModel", GPTQ, GPTQMODEL, {"desc_act": False}),
    Peer("llm-compressor's GPTQ", GPTQ, LLMCOMPRESSOR, {}),
)


def _text(model: Path, folder: Path) -> Path:
    """What the model writes, in the manner of `convert --calibrate`: windows of token ids."""
    path = folder / "windows.json"
    if not path.exists():
        everything = {"version": 1, "rules": [{"match": "*", "method": "auto"}]}
        preset = load_resolved(everything, "peers")
        plan = resolve_plan(preset, open_source(model), Target(device="cpu"))
        with Reader() as reader:
            network = Network(plan, reader, torch.device("cpu"))
            tokenizer = AutoTokenizer.from_pretrained(model)
            made = write_text(network, tokenizer, TEXT_WINDOWS, LENGTH, 0)
        path.write_text(json.dumps(made.tolist()), encoding="utf-8")
    return path


if __name__ == "__main__":
    for peer in PEERS:
        print(python_of(peer.tool))
