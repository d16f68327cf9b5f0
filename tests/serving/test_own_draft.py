"""Layers of multi-token prediction in the model's own checkpoint, by the preset's section draft."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.families.architectures import find
from benchmarks.families.checkpoints import make_checkpoint
from benchmarks.families.newer import NEWER
from tests.commands import convert
from tests.presets import write_preset
from tests.serving.stock import load
from tests.serving.test_draft import problems

pytestmark = [
    pytest.mark.usefixtures("sglang_context", "forgetful"),
    # what SGLang's models say to SGLang when they are imported
    pytest.mark.filterwarnings("ignore:MultiPlatformOp:DeprecationWarning"),
]


class Kind(NamedTuple):
    """How a family stores its layer of multi-token prediction, and what SGLang calls it.

    Attributes:
        block: the decoder layer that it is like.
        stored, served: that layer's name in the checkpoint, and in SGLang's draft model.
        beside: what else there is, as it is stored -> its shape in hidden sizes.
    """

    block: str
    stored: str
    served: str
    beside: Mapping[str, tuple[int, ...]]


_NEXT_N = {"enorm": (1,), "hnorm": (1,), "eh_proj": (1, 2), "shared_head.norm": (1,)}
_BEHIND = Kind(
    "model.layers.1",
    "model.layers.2",
    "model.decoder",
    {f"model.layers.2.{name}": shape for name, shape in _NEXT_N.items()},
)
_BELOW_MTP = Kind(
    "model.layers.1",
    "mtp.layers.0",
    "model.layers.0",
    {
        "mtp.fc": (1, 2), "mtp.norm": (1,), "mtp.pre_fc_norm_embedding": (1,),
        "mtp.pre_fc_norm_hidden": (1,),
    },
)  # fmt: skip
_NEXT = next(one.architecture for one in NEWER if one.architecture.name == "Qwen3-Next")
FAMILIES = {
    "DeepSeek-V3": (find("DeepSeek-V3"), _BEHIND),
    "GLM-4-MoE": (find("GLM-4-MoE"), _BEHIND),
    "Qwen3-Next": (_NEXT, _BELOW_MTP),
}
_TAKEN_OVER = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests loaded in this process was not loaded."""
    from mixedprec_plugin.serving import loader

    monkeypatch.setattr(loader, "_loaded", None)
    monkeypatch.setattr(loader, "_loaded_draft", None)


@pytest.fixture(scope="module", params=FAMILIES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Kind]:
    """A small checkpoint with a layer of multi-token prediction."""
    architecture, kind = FAMILIES[request.param]
    path = make_checkpoint(architecture, tmp_path_factory.mktemp("drafts"))
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    added = {
        name.replace(kind.block, kind.stored, 1): random(*tensor.shape).to(tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(f"{kind.block}.")
    }
    assert any(".self_attn." in name for name in added)
    hidden = config["hidden_size"]
    for name, shape in kind.beside.items():
        added[f"{name}.weight"] = random(*(hidden * n for n in shape)).bfloat16()
    if kind is _BEHIND:
        # published checkpoints hold the model's embedding and head a second time
        for name in ("embed_tokens", "shared_head.head"):
            added[f"{kind.stored}.{name}.weight"] = tensors["model.embed_tokens.weight"].clone()
        config["num_nextn_predict_layers"] = 1
        (path / "config.json").write_text(json.dumps(config))
    save_file(tensors | added, path / "model.safetensors", {"format": "pt"})
    return path, kind


def write_draft_preset(folder: Path, *rules: str) -> Path:
    """A preset by which the model itself is bf16 but for its experts."""
    path = write_preset(folder, 'match: "*.experts.*", method: awq')
    listed = ", ".join(f"{{{rule}}}" for rule in rules)
    path.write_text(f"{path.read_text()}draft: {{rules: [{listed}]}}\n")
    return path


def parameters_of(path: Path, preset: Path | None, **how: Any) -> dict[str, torch.Tensor]:
    """The parameters of the draft model that SGLang makes of a checkpoint."""
    from mixedprec_plugin.serving.hooks import asked_for

    extra = {"mixedprec_config": str(preset)} if preset else {}
    how = how or {"load_format": "mixedprec", "model_loader_extra_config": extra}
    with asked_for() if "model_loader_extra_config" in how else contextlib.nullcontext():
        model = load(path, is_draft=True, **how)
    assert type(model).__name__.endswith(("NextN", "MTP"))
    return {n: p.data for n, p in model.named_parameters() if n not in _TAKEN_OVER}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not found[name].equal(expected[name])] == []


def test_every_parameter_in_floats_is_what_sglang_loads(
    written: tuple[Path, Kind], tmp_path: Path
) -> None:
    path, _ = written
    preset = write_draft_preset(tmp_path, 'match: "*", method: bf16')
    assert_same(parameters_of(path, preset), parameters_of(path, None, load_format="auto"))


def test_converted_layers_are_loaded_as_they_are_stored(
    written: tuple[Path, Kind], tmp_path: Path
) -> None:
    """Without a section SGLang would read what it does not know, and cast it."""
    path, kind = written
    rule = f'match: "{kind.stored}.*.experts.*", method: fp8_block'
    out, again = tmp_path / "converted", tmp_path / "again"
    assert convert(path, write_draft_preset(tmp_path, rule), out)[0] == 0
    plain = write_preset(tmp_path / "plain", 'match: "*.experts.*", method: awq')
    assert convert(out, plain, again)[0] == 0
    stored = load_file(again / "model.safetensors")
    assert stored[f"{kind.stored}.mlp.experts.3.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert_same(parameters_of(again, None), parameters_of(out, None))


def test_section_is_served_and_kept_by_convert(written: tuple[Path, Kind], tmp_path: Path) -> None:
    path, kind = written
    rules = 'match: "*.o_proj", method: fp8', f'match: "{kind.stored}.*.experts.*", method: awq'
    preset = write_draft_preset(tmp_path, *rules)
    served = parameters_of(path, preset)
    stored = load_file(path / "model.safetensors")
    attention = kind.served if kind is _BELOW_MTP else f"{kind.served}.self_attn"
    codes, scale = (served[f"{attention}.o_proj.{name}"] for name in ("weight", "weight_scale"))
    weight = stored[f"{kind.stored}.self_attn.o_proj.weight"].float()
    assert codes.dtype == torch.float8_e4m3fn
    assert (codes.float() * scale - weight).norm() < 2**-4 * weight.norm()
    assert f"{kind.served}.mlp.experts.w13_qweight" in served
    out = tmp_path / "converted"
    assert convert(path, preset, out)[0] == 0
    assert_same(parameters_of(out, None), served)


def test_section_is_checked_at_start(written: tuple[Path, Kind], tmp_path: Path) -> None:
    path, kind = written
    good = write_draft_preset(tmp_path / "good", 'match: "*.experts.*", method: fp8_block')
    assert problems(path, good, path) == []
    joined = "mtp.fc" if kind is _BELOW_MTP else f"{kind.stored}.eh_proj"
    bad = write_draft_preset(tmp_path / "bad", f'match: "{joined}", method: fp8')
    (problem,) = problems(path, bad, path)
    assert f"{joined} cannot run in " in problem
    assert "SGLang runs it unquantized" in problem
