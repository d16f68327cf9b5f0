"""Statistics of a sweep against autograd over the whole model in transformers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mixedprec_plugin.calibrate import sweep
from mixedprec_plugin.calibrate.capture import Capture, Seen
from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.calibrate.sweep import Sweep
from mixedprec_plugin.checkpoint.reader import Reader
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan, PlannedLayer
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_resolved
from tests.calibrate.models import VOCABULARY, write_model

CPU = torch.device("cpu")


def plan_of(folder: Path, method: str = "awq") -> Plan:
    rule = {"match": "*_proj", "method": method, "group_size": 32}
    preset = load_resolved({"version": 1, "rules": [rule]}, "test")
    return resolve_plan(preset, open_source(folder), Target("cpu")).check()


class Keeper:
    """In the place of a rounding: keeps what layers saw."""

    def __init__(self, fails_at: int = -1) -> None:
        self.seen: dict[str, Seen] = {}
        self.calls = 0
        self.fails_at = fails_at

    def __call__(
        self, layers: Sequence[PlannedLayer], seen: dict[str, Seen], _: int
    ) -> Iterator[tuple[PlannedLayer, dict[str, torch.Tensor], dict[str, Any]]]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        for layer in layers:
            if layer.name in seen:
                self.seen[layer.name] = seen[layer.name]
            yield layer, {"codes": torch.zeros(1)}, {"loss": 0.0}


def swept(
    plan: Plan,
    tokens: torch.Tensor,
    folder: Path,
    keeper: Keeper,
    *,
    gradients: bool = True,
    held_out: int = 0,
) -> list[torch.Tensor]:
    """Sweep; returns the labels that were drawn, window by window."""
    labels: list[torch.Tensor] = []
    names = {layer.name for layer in plan.layers if layer.name.endswith("_proj")}
    with Reader() as reader:
        network = Network(plan, reader, CPU)
        own = Sweep(network, tokens, folder, 0, gradients=gradients, held_out=held_out)
        draw = own._draw

        def drawn(window: int, logits: torch.Tensor) -> torch.Tensor:
            labels.append(draw(window, logits))
            return labels[-1]

        own._draw = drawn  # type: ignore[method-assign]
        own.run(names, keeper, lambda _: None)
    return labels


def gradients_of(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the loss to every weight, by the checkpoint's names."""
    model.zero_grad()
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(gradient):
                gate, up = both.chunk(2)
                base = layer.removesuffix(".gate_up_proj")
                found |= {f"{base}.{expert}.gate_proj": gate, f"{base}.{expert}.up_proj": up}
        elif name.endswith("experts.down_proj"):
            base = layer.removesuffix(".down_proj")
            found |= {f"{base}.{expert}.down_proj": one for expert, one in enumerate(gradient)}
        else:
            found[layer] = gradient
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_every_layer_is_seen_with_its_own_gradient(tmp_path: Path, kind: str) -> None:
    """Of one token, a weight's gradient is dy x': its square is N w times that of x."""
    model = write_model(tmp_path / "model", kind)
    plan, keeper = plan_of(tmp_path / "model"), Keeper()
    tokens = torch.tensor([[7]])
    (tmp_path / "work").mkdir()
    labels = swept(plan, tokens, tmp_path / "work", keeper)
    expected = gradients_of(model, tokens, torch.stack(labels))
    names = [layer.name for layer in plan.layers if layer.name.endswith("_proj")]
    # of experts, those that the token went to
    seen_of = [name for name in names if "experts" not in name or bool(expected[name].any())]
    assert keeper.seen.keys() == set(seen_of)
    for name, seen in keeper.seen.items():
        (x,), (weights,) = seen.x, seen.weights
        square = len(expected[name]) * weights.sum() * x.float().square().sum()
        # x is kept in bfloat16
        # a softmax over one key has no gradient but noise
        atol = 1e-9 if name.endswith(("q_proj", "k_proj")) else 0
        torch.testing.assert_close(square, expected[name].square().sum(), rtol=0.01, atol=atol)


def test_weights_are_those_of_autograd_over_the_whole_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    plan, keeper = plan_of(tmp_path / "model"), Keeper()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (5, 16), generator=generator)
    (tmp_path / "work").mkdir()
    labels = swept(plan, tokens, tmp_path / "work", keeper)
    outputs: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
            out.register_hook(
                lambda g: outputs.setdefault(name, []).append(g.square().mean(-1).flatten())
            )

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(watch(name))
    gradients_of(model, tokens, torch.stack(labels))
    assert keeper.seen.keys() == outputs.keys()
    for name, seen in keeper.seen.items():
        expected = outputs[name][0]
        # attention that looks at one token leaves little but rounding of its gradient
        atol = 1e-3 * float(expected.max())
        torch.testing.assert_close(torch.cat(seen.weights), expected, rtol=0.05, atol=atol)


def test_text_that_is_held_out_is_kept_apart_with_whole_gradients(tmp_path: Path) -> None:
    """But for the first token of each window."""
    model = write_model(tmp_path / "model")
    plan, keeper = plan_of(tmp_path / "model"), Keeper()
    tokens = torch.arange(3, 3 + 80).view(5, 16)
    (tmp_path / "work").mkdir()
    labels = swept(plan, tokens, tmp_path / "work", keeper, held_out=2)
    gradients: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_hook(
                lambda _m, _x, out, name=name: (
                    out.register_hook(lambda g: gradients.update({name: g.flatten(0, 1)})) and None
                )
            )
    gradients_of(model, tokens, torch.stack(labels))
    for name, expected in gradients.items():
        seen = keeper.seen[name]
        (held,) = seen.held
        assert len(torch.cat(seen.weights)) == len(torch.cat(seen.x)) == 3 * 16
        assert held.gradients is not None
        torch.testing.assert_close(
            held.gradients,
            expected.view(5, 16, -1)[3:, 1:].flatten(0, 1),
            rtol=0.01,
            atol=0.001 * float(expected.std()),
        )


def test_nothing_of_a_layer_is_held_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph holds the hooks, these the capture: memory must not follow the model's depth."""
    made = []

    class Watched(Capture):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(sweep, "Capture", Watched)
    write_model(tmp_path / "model")
    (tmp_path / "work").mkdir()
    tokens = torch.arange(3, 3 + 48).view(3, 16)
    swept(plan_of(tmp_path / "model"), tokens, tmp_path / "work", Keeper())
    gc.collect()
    # forward, where nothing is kept, and backward
    assert len(made) == 6
    assert not [one for one in made if one() is not None]


def test_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    plan = plan_of(tmp_path / "model")
    tokens = torch.arange(3, 3 + 48).view(3, 16)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = Keeper()
    swept(plan, tokens, tmp_path / "whole", whole)
    first, second = Keeper(fails_at=2), Keeper()
    with pytest.raises(KeyboardInterrupt):
        swept(plan, tokens, tmp_path / "stopped", first)
    swept(plan, tokens, tmp_path / "stopped", second)
    assert second.calls == whole.calls - 1
    assert first.seen.keys() | second.seen.keys() == whole.seen.keys()
    for name, seen in second.seen.items():
        assert torch.equal(torch.cat(seen.weights), torch.cat(whole.seen[name].weights))
    left = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}


def test_without_gradients_all_tokens_count_alike(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "qwen3_moe")
    plan, keeper = plan_of(tmp_path / "model"), Keeper()
    tokens = torch.arange(3, 3 + 48).view(3, 16)
    (tmp_path / "work").mkdir()
    swept(plan, tokens, tmp_path / "work", keeper, gradients=False)
    assert all(bool((w == 1).all()) for seen in keeper.seen.values() for w in seen.weights)
    down = sum(len(x) for name, s in keeper.seen.items() if "1.mlp" in name for x in s.x)
    # two experts a token, each with three projections
    assert down == 48 * 2 * 3
