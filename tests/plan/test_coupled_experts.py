"""Experts and routers of two sources, one of them folded by powers of two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixedprec_plugin.compose.stream import VirtualCheckpoint
from tests.checkpoints import write_checkpoint
from tests.plan.mixtures import CPU, mixed_plan

PREFIX = "model.layers.0."
MOE = f"{PREFIX}block_sparse_moe."
NORM = f"{PREFIX}post_attention_layernorm"
EXPERTS = range(3)


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{PREFIX}input_layernorm": (64,), NORM: (64,), f"{MOE}gate": (3, 64)}
    for expert in EXPERTS:
        shapes |= {f"{MOE}experts.{expert}.{w}": (128, 64) for w in ("w1", "w3")}
        shapes[f"{MOE}experts.{expert}.w2"] = (64, 128)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.fixture
def folders(tmp_path: Path, base: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-2, 3, (64,), generator=generator).bfloat16()
    folded = dict(base)
    folded[f"{NORM}.weight"] = base[f"{NORM}.weight"] / scale
    names = ["gate", *(f"experts.{e}.{w}" for e in EXPERTS for w in ("w1", "w3"))]
    for name in (f"{MOE}{name}.weight" for name in names):
        folded[name] = base[name] * scale
    for expert in EXPERTS:
        rows = 2.0 ** torch.randint(-1, 2, (128,), generator=generator).bfloat16()
        up, down = (f"{MOE}experts.{expert}.{w}.weight" for w in ("w3", "w2"))
        folded[up] = folded[up] / rows[:, None]
        folded[down] = base[down] * rows
    config = {"architectures": ["SliceOfAMixtral"], "model_type": "mixtral",
              "hidden_size": 64, "torch_dtype": "bfloat16"}  # fmt: skip
    return (
        write_checkpoint(tmp_path / "model", config, base),
        write_checkpoint(tmp_path / "folded", config, folded),
    )


def test_experts_of_a_folded_source_are_rescaled_to_the_models_norm(
    folders: tuple[Path, Path], base: dict[str, torch.Tensor]
) -> None:
    model, folded = folders
    line = 'match: "*.experts.{1..2}.*", method: bf16, source: folded'
    plan = mixed_plan(model, line, target=CPU, folded=folded)
    assert not plan.errors
    served = dict(iter(VirtualCheckpoint(plan)))
    same = ["gate.weight", "experts.0.w1.weight", "experts.1.w1.weight", "experts.2.w1.weight"]
    for name in (f"{NORM}.weight", *(f"{MOE}{name}" for name in same)):
        assert torch.equal(served[name], base[name])
    # rows of w3 keep their scales, which columns of the same source's w2 make up for
    assert not torch.equal(served[f"{MOE}experts.1.w3.weight"], base[f"{MOE}experts.1.w3.weight"])


def test_router_is_rescaled_to_the_norm_of_its_experts(
    folders: tuple[Path, Path], base: dict[str, torch.Tensor]
) -> None:
    model, folded = folders
    plan = mixed_plan(
        model,
        'match: "*.experts.*", method: bf16, source: folded',
        f'match: "{NORM}", method: bf16, source: folded',
        target=CPU,
        folded=folded,
    )
    assert not plan.errors
    assert plan.by_name[f"{MOE}gate"].source == "model"
    assert plan.by_name[f"{MOE}gate"].action == "cast"
    served = dict(iter(VirtualCheckpoint(plan)))
    logits = served[f"{MOE}gate.weight"] * served[f"{NORM}.weight"]
    assert torch.equal(logits, base[f"{MOE}gate.weight"] * base[f"{NORM}.weight"])


def test_one_experts_down_without_its_up_is_an_error(folders: tuple[Path, Path]) -> None:
    model, folded = folders
    line = 'match: "*.experts.{0,2}.w2", method: bf16, source: folded'
    (problem,) = mixed_plan(model, line, target=CPU, folded=folded).errors
    assert str(problem) == (
        f"{MOE}experts.0,2.w2: comes from 'folded' and is right only behind its "
        "own w3, which comes from 'model': the rows of the two are scaled differently; take w3 and "
        "w2 from one source"
    )
