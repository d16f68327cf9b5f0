"""A file whose tensors are read directly into where they are copied."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.ahead import ReadAhead
from mixedprec_plugin.checkpoint.direct import DirectReads
from mixedprec_plugin.checkpoint.headers import StoredTensor, read_header

# 12 MiB of float32, pieces of 1 MiB
N, K = 3072, 1024


class DirectFile:
    """A file, and what reads it."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path)
        self.path = path
        # not mappings of the file
        self.expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
        self.stored: dict[str, StoredTensor] = read_header(path)
        self.direct = DirectReads(num_threads=2)
        self.reader = ReadAhead(self.stored.values(), direct=self.direct)

    def take(self, name: str) -> torch.Tensor:
        """What is handed out for a tensor of the file."""
        return self.reader.read_to_place(self.stored[name])


def random_weights() -> torch.Tensor:
    """The same each time, [N, K]."""
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))
