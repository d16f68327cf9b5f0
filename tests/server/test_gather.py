"""What an engine's layers read, gathered over two ranks, and a search that stands on it."""

from __future__ import annotations

import functools
import itertools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from mixedprec_plugin.calibrate.gathered import Gathered
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.evaluate.server import Server
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.search.candidates import AS_STORED, find_choices
from mixedprec_plugin.search.gathered import score_gathered, unscored
from mixedprec_plugin.search.kept import Basis, Scores
from mixedprec_plugin.search.scores import make_scores
from tests.calibrate.models import SIZES, VOCABULARY, write_model

# of each, all but the first token are taken
NUM_PROMPTS, LENGTH = 16, 41
BF16 = 'version: 1\nrules:\n  - match: "*"\n    method: bf16\n'


class Run(NamedTuple):
    """A model, the prompts that it was served, [16, 41], and what it gathered."""

    model: Path
    prompts: torch.Tensor
    inputs: Path
    log: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("gather")
    model, inputs, log = folder / "model", folder / "inputs", folder / "log"
    # SGLang pads smaller experts on a CPU
    write_model(model, "qwen3_moe", sizes={**SIZES, "moe_intermediate_size": 128})
    (folder / "bf16.yaml").write_text(BF16)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (NUM_PROMPTS, LENGTH), generator=generator)
    prompts[:, 0] = torch.arange(3, 3 + NUM_PROMPTS)  # no prefix is in the cache
    flags = ["--mixedprec-inputs", str(inputs), "--mixedprec-inputs-tokens", "640"]
    flags += ["--tp", "2", "--skip-server-warmup"]
    with Server(model, log, folder / "bf16.yaml", flags) as server:
        for prompt in [*prompts.tolist(), [5] * 20]:
            sampling = {"max_new_tokens": 3, "temperature": 0}
            server.request("/generate", {"input_ids": prompt, "sampling_params": sampling})
    return Run(model, prompts, inputs, log.read_text())


def read_by_transformers(run: Run, *names: str) -> dict[str, torch.Tensor]:
    """Module -> what goes into it, [640, K], the first token of each prompt left out."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        run.model, dtype=torch.bfloat16, experts_implementation="eager"
    )
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any, args: Any, kwargs: Any) -> None:
        x = (*args, *kwargs.values())[0]
        found[name] = x.view(NUM_PROMPTS, LENGTH, -1)[:, 1:].flatten(0, 1)

    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
    with torch.no_grad():
        model(run.prompts)
    return found


def test_every_module_has_what_transformers_layers_read(run: Run) -> None:
    plan = find_choices(open_source(run.model), Target("cpu")).base
    gathered = Gathered(run.inputs, plan)
    assert gathered.num_tokens == 640
    assert not gathered.unseen
    expected = read_by_transformers(run, "q_proj", "o_proj", "mlp.experts")
    assert len(expected) == 9
    for layer, x in expected.items():
        name = layer.replace("q_proj", "qkv_proj")
        tokens = gathered.tokens(name, x.shape[1])
        distance = (tokens.x.float() - x.float()).norm() / x.float().norm()
        # roundings to bfloat16 (2^-9 each) of another order, in up to three decoder layers
        assert distance < 0.02, (name, distance)
        # the same order of tokens, and each rank's columns in their place
        assert torch.nn.functional.cosine_similarity(tokens.x.float(), x.float(), 1).min() > 0.99
    assert "no more are gathered" in run.log


def test_shares_are_those_of_what_branches_add_to_the_residual_stream(run: Run) -> None:
    plan = find_choices(open_source(run.model), Target("cpu")).base
    names = ("input_layernorm", "post_attention_layernorm", "model.norm")
    read = read_by_transformers(run, *names)
    points = [
        read[f"model.layers.{layer}.{name}"].float() for layer in range(3) for name in names[:2]
    ] + [read["model.norm"].float()]
    expected = {}
    for branch, (before, after) in enumerate(itertools.pairwise(points)):
        share = float((after - before).square().sum() / after.square().sum())
        layer, is_mlp = divmod(branch, 2)
        for name in ("mlp.experts",) if is_mlp else ("self_attn.qkv_proj", "self_attn.o_proj"):
            expected[f"model.layers.{layer}.{name}"] = share
    assert Gathered(run.inputs, plan).shares == pytest.approx(expected, rel=0.02)


def test_scores_are_those_of_the_same_text_in_transformers(run: Run, tmp_path: Path) -> None:
    choices = find_choices(open_source(run.model), Target("cpu"), ("awq", "fp8_channel"))
    wanted = {
        name: [x for x in unit.options if x != AS_STORED] for name, unit in choices.units.items()
    }
    gathered = Gathered(run.inputs, choices.base)
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{token}" for token in run.prompts.flatten().tolist()))
    basis = Basis(text, windows=12, held_out=4, length=LENGTH, gradients=False)
    with Progress(disable=True) as bar:
        assert not unscored(choices, gathered)
        made = functools.reduce(operator.or_, score_gathered(choices, wanted, gathered, bar))
        expected = make_scores(choices, wanted, basis, tmp_path, bar)
    assert made.keys() == expected.keys()
    shares = {name: gathered.shares[unit.layers[0].module] for name, unit in choices.units.items()}
    made = {unit: {k: x / shares[unit] for k, x in own.items()} for unit, own in made.items()}
    ours, theirs = flat(made), flat(expected)
    assert len(ours) == 18 * 5
    # on other tokens of the text
    ratio = (ours / theirs).log()
    assert ratio.mean().abs() < 0.1
    assert ratio.std() < 0.3
    ranks = torch.stack([x.argsort().argsort().double() for x in (ours, theirs)])
    assert torch.corrcoef(ranks)[0, 1] > 0.9


def flat(scores: Scores) -> torch.Tensor:
    return torch.tensor([x for unit in sorted(scores) for _, x in sorted(scores[unit].items())])
