"""What of test_serving.py a machine without a GPU can check: how it judges, and its adapter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_llama
from tests.gpu.adapters import ALPHA, PROJECTIONS, RANK, AdaptedLinear, adapt, write_adapter
from tests.gpu.serving import Continuation, agreement, near_tie

ONE = Continuation([5, 6, 7], [{5: -0.1, 9: -3.0}, {6: -0.6, 8: -0.7}, {7: -0.2}])


def test_same_tokens_agree_and_how_far_their_log_probabilities_are_is_known() -> None:
    other = Continuation(ONE.tokens, [{5: -0.15}, {6: -0.6}, {7: -0.2}])
    found = agreement([ONE], [other])
    assert (found.num_equal, found.gaps) == (1, [])
    assert found.shift == pytest.approx(0.05)


def test_tokens_that_change_places_are_judged_by_how_far_they_moved() -> None:
    # 6 led by 0.1 and is behind by 0.2; what follows is another text
    other = Continuation([5, 8, 1], [{5: -0.1}, {8: -0.5, 6: -0.7}, {1: -0.3}])
    found = agreement([ONE], [other])
    assert found.num_equal == 0
    assert found.gaps == [pytest.approx(0.3)]
    assert found.is_explained(0.01)
    assert not found.is_explained(0.002)


def test_token_that_was_not_among_the_best_is_no_near_tie() -> None:
    other = Continuation([5, 1, 1], [{5: -0.1}, {1: -0.5, 6: -0.7}, {1: -0.3}])
    found = agreement([ONE], [other])
    assert found.gaps == [math.inf]
    assert not found.is_explained(0.01)


def test_near_tie_is_three_deviations_of_two_tokens() -> None:
    """Of normal differences of log-probabilities, drawn."""
    limit = 0.01
    generator = torch.Generator().manual_seed(3)
    p = torch.log_softmax(torch.randn(200, 1000, generator=generator), -1)
    noise = math.sqrt(2 * limit) * torch.randn(200, 1000, generator=generator)
    q = torch.log_softmax(p + noise, -1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(limit, rel=0.05)
    moved = noise[:, 1:] - noise[:, :-1]
    assert float(moved.std()) * 3 == pytest.approx(near_tie(limit), rel=0.05)


@torch.inference_mode()
def test_adapted_layer_is_the_layer_with_merged_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, a, b, x = (
        torch.randn(*shape, generator=generator) for shape in ((6, 5), (RANK, 5), (6, RANK), (3, 5))
    )
    base = torch.nn.Linear(5, 6, bias=False)
    base.weight.copy_(weight)
    merged = weight + ALPHA / RANK * b @ a
    torch.testing.assert_close(AdaptedLinear(base, a, b)(x), x @ merged.T)


def test_adapter_is_on_every_projection(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_llama(tmp_path / "model")
    adapter = write_adapter(path, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(path)
    num_layers = model.config.num_hidden_layers
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * 7 * num_layers
    adapt(model, adapter)
    adapted = [name for name, x in model.named_modules() if isinstance(x, AdaptedLinear)]
    assert len(adapted) == len(PROJECTIONS) * num_layers
