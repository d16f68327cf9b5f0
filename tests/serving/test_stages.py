"""The placeholders of a pipeline stage, as SGLang builds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.usefixtures("sglang_context")


@pytest.fixture
def layers(llama: Path) -> SimpleNamespace:
    from tests.presets import plan

    made = plan(llama, 'match: "*", method: fp8')
    return SimpleNamespace(tied=made.tied, planned={x.name: x for x in made.layers})


def model_of(**modules: object) -> object:
    import torch
    from sglang.srt.layers.utils.common import PPMissingLayer

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    here = torch.nn.Identity
    model.model.embed_tokens = PPMissingLayer()
    model.model.layers = torch.nn.ModuleList([PPMissingLayer(), here(), here()])
    model.model.norm = here()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def test_last_stage_reads_its_own_layers_and_the_embedding_of_its_head(
    layers: SimpleNamespace,
) -> None:
    import torch

    from mixedprec_plugin.serving.stages import Stage

    stage = Stage(model_of(lm_head=torch.nn.Identity()), layers.tied)
    read = {name for name, layer in layers.planned.items() if stage.runs(layer)}
    assert "model.embed_tokens" in read
    assert not any(name.startswith("model.layers.0.") for name in read)
    assert "model.layers.1.mlp.up_proj" in read
    assert stage.describe(layers.planned.values()).startswith("this pipeline stage reads ")


def test_stage_that_has_no_head_does_not_read_the_embedding(layers: SimpleNamespace) -> None:
    from sglang.srt.layers.utils.common import PPMissingLayer

    from mixedprec_plugin.serving.stages import Stage

    stage = Stage(model_of(lm_head=PPMissingLayer()), layers.tied, is_last=False)
    assert not stage.runs(layers.planned["model.embed_tokens"])


def test_last_stage_without_a_head_is_refused(layers: SimpleNamespace) -> None:
    from mixedprec_plugin.errors import LoadError
    from mixedprec_plugin.serving.stages import Stage

    model = model_of()
    model.lm_head = model.model.embed_tokens  # type: ignore[attr-defined]
    with pytest.raises(LoadError, match="gives the last stage no head of its own; start wit"):
        Stage(model, layers.tied)


def test_model_that_sglang_does_not_split_is_refused(layers: SimpleNamespace) -> None:
    import torch

    from mixedprec_plugin.errors import LoadError
    from mixedprec_plugin.serving.stages import Stage

    with pytest.raises(LoadError, match="--pp-size 2: SGLang's Module is not split into pip"):
        Stage(torch.nn.Module(), layers.tied, num_stages=2)
