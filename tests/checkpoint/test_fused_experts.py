from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import Source, open_source
from mixedprec_plugin.families.names import ExpertShard
from tests.presets import plan, problem_texts

EXPERTS = "model.layers.0.mlp.experts"
E, H, I = 3, 64, 32  # noqa: E741


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    text = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": H, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    return folder


def fused(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "gate_up_proj": torch.randn(E, 2 * I, H, generator=generator).bfloat16(),
        "down_proj": torch.randn(E, H, I, generator=generator).bfloat16(),
    }
    return {f"{EXPERTS}.{name}": t for name, t in (tensors | changes).items()}


def read(source: Source, layer: str, suffix: str = "weight") -> torch.Tensor:
    with Reader() as reader:
        return reader.read(source.layers[layer][suffix])


def test_every_expert_is_a_slice(tmp_path: Path) -> None:
    tensors = fused()
    source = open_source(write(tmp_path / "m", tensors))
    assert len(source.layers) == 3 * E
    for expert in range(E):
        gate, up = tensors[f"{EXPERTS}.gate_up_proj"][expert].chunk(2)
        assert torch.equal(read(source, f"{EXPERTS}.{expert}.gate_proj"), gate)
        assert torch.equal(read(source, f"{EXPERTS}.{expert}.up_proj"), up)
        down = tensors[f"{EXPERTS}.down_proj"][expert]
        assert torch.equal(read(source, f"{EXPERTS}.{expert}.down_proj"), down)
    stored = source.layers[f"{EXPERTS}.2.up_proj"]["weight"]
    assert (stored.name, stored.dtype) == (f"{EXPERTS}.2.up_proj.weight", "BF16")


def test_scales_and_biases_are_sliced_along(tmp_path: Path) -> None:
    scale, bias = torch.rand(E, 2, 1), torch.rand(E, 2 * I)
    tensors = fused(
        gate_up_proj_scale_inv=scale,
        down_proj_scale_inv=torch.rand(E, 1, 1),
        gate_up_proj_bias=bias,
    )
    source = open_source(write(tmp_path / "m", tensors))
    assert set(source.layers[f"{EXPERTS}.1.up_proj"]) == {"weight", "weight_scale_inv", "bias"}
    assert set(source.layers[f"{EXPERTS}.1.down_proj"]) == {"weight", "weight_scale_inv"}
    up = f"{EXPERTS}.1.up_proj"
    assert torch.equal(read(source, up, "weight_scale_inv"), scale[1, 1:])
    assert torch.equal(read(source, up, "bias"), bias[1, I:])


def test_plan_knows_fused_experts_one_by_one(tmp_path: Path) -> None:
    model = write(tmp_path / "m", fused())
    made = plan(model, f'match: "{EXPERTS}.{{0,2}}.*", method: gptq, group_size: 32')
    (groups,) = made.expert_groups.values()
    assert [group.experts for group in groups] == [(0, 2), (1,)]
    assert made.by_name[f"{EXPERTS}.2.down_proj"].shard == ExpertShard(2, "w2")


def test_config_of_the_language_model_counts(tmp_path: Path) -> None:
    model = write(tmp_path / "m", fused(), hidden_size=7, text_config={"hidden_size": H})
    assert f"{EXPERTS}.0.up_proj" in open_source(model).layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gate_up_proj": torch.zeros(E, H, 96), "down_proj": torch.zeros(E, 48, H)},
            "its experts are stored transposed, [3, 64, 96] (expected [3, 96, 64]), and gate and "
            "up of one are no runs of bytes",
        ),
        (  # a square, told by the other tensor
            {"down_proj": torch.zeros(E, I, H)},
            "its experts are stored transposed, [3, 64, 64] (expected [3, 64, 64]), and gate and "
            "up of one are no runs of bytes",
        ),
        (
            {"gate_up_proj_scale": torch.zeros(E, 4)},
            "its experts are stored in down_proj, gate_up_proj, gate_up_proj_scale",
        ),
        (
            {"gate_up_proj": torch.zeros(E, 2 * I, 96)},
            "its experts are stored as [3, 64, 96] and [3, 64, 32] (expected [E, 2I, 64] and "
            "[E, 64, I])",
        ),
        (
            {"gate_up_proj_scale_inv": torch.zeros(E, 3, 1)},
            "gate_up_proj_scale_inv [3, 3, 1] cannot be split over its 3 experts",
        ),
        (  # an even number of blocks of 128 rows, the first of which reaches into up
            {
                "gate_up_proj": torch.zeros(E, 192, H),
                "down_proj": torch.zeros(E, H, 96),
                "gate_up_proj_scale_inv": torch.zeros(E, 2, 1),
            },
            "no block of gate_up_proj_scale_inv [3, 2, 1] ends where gate does, at row 96",
        ),
    ],
)
def test_experts_that_cannot_be_sliced_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    made = plan(write(tmp_path / "m", fused(**changes)), 'match: "*", method: bf16')
    # the checkpoint has nothing else
    assert [text for text in problem_texts(made) if "lacks it" not in text] == [
        f"error: {EXPERTS}: {message}; take a checkpoint that stores them one by one"
    ]
