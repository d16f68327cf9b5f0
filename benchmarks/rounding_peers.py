"""Other tools that round to 4 bits, calibrated on the text that `convert --calibrate` writes.

Each runs in an environment of its own below the cache, see benchmarks/third_party. `python -m
benchmarks.rounding_peers` installs them; the benchmark takes those that are there.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.third_party.environments import is_installed, python_of, run_module
from benchmarks.third_party.recipes import AUTO_ROUND, AUTOAWQ, GPTQMODEL, LLMCOMPRESSOR, Tool
from mixedprec_plugin.calibrate import LENGTH, WINDOWS
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.text import write_text
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_resolved

AWQ, GPTQ = "awq, groups of 64", "gptq, groups of 64"


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

    def make(self, model: Path, folder: Path) -> Path | None:
        """The folder of its checkpoint; None where the tool is not installed, or fails."""
        if not is_installed(self.tool):
            return None
        out = folder / self.tool.name
        out.mkdir()
        arguments = {**self.arguments, "group_size": 64, "text": str(_text(model, folder))}
        words = [str(model), str(out), json.dumps(arguments)]
        log = folder / f"{self.tool.name}.log"
        try:
            run_module(self.tool, f"quantize_{self.tool.script}", words, log)
        except subprocess.CalledProcessError:
            end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            print(f"{self.title} failed: {end}", file=sys.stderr)
            return None
        return out


PEERS = (
    Peer("AutoAWQ", AWQ, AUTOAWQ, {}),
    Peer("auto-round's AWQ", AWQ, AUTO_ROUND, {"fold": True}),
    Peer("GPTQModel", GPTQ, GPTQMODEL, {"desc_act": False}),
    Peer("llm-compressor's GPTQ", GPTQ, LLMCOMPRESSOR, {}),
)


def _text(model: Path, folder: Path) -> Path:
    """What the model writes, as `convert --calibrate` has it write: windows of token ids."""
    path = folder / "windows.json"
    if not path.exists():
        everything = {"version": 1, "rules": [{"match": "*", "method": "auto"}]}
        preset = load_resolved(everything, "peers")
        plan = resolve_plan(preset, open_source(model), Target(device="cpu"))
        with Reader() as reader:
            network = Network(plan, reader, torch.float32, torch.device("cpu"))
            tokenizer = AutoTokenizer.from_pretrained(model)
            made = write_text(network, tokenizer, WINDOWS, LENGTH, 0)
        path.write_text(json.dumps(made.tolist()), encoding="utf-8")
    return path


if __name__ == "__main__":
    for peer in PEERS:
        print(python_of(peer.tool))
