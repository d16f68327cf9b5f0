"""The verb, on a model whose scores take a second."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.families.names import ExpertShard
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.memory import rank_bytes
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from mixedprec_plugin.search.candidates import find_choices
from mixedprec_plugin.search.finder import GUESSES, Budget, Search
from mixedprec_plugin.search.rule import guessed
from mixedprec_plugin.search.write import Chosen, preset_text, publish
from tests import commands
from tests.calibrate.models import write_model
from tests.published import deepseek_v3, qwen3_30b_a3b

TEXT = ("--windows", "6", "--held-out", "4", "--length", "24")
# two with calibrated codes and without, and one that rounds activations
FEW = ("--methods", "awq,gptq,fp8_channel")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "model"
    write_model(folder)
    return folder


def run(model: Path, *words: object) -> tuple[int, str, str]:
    return commands.run("search", "--device", "cpu", "--model", model, *words)


def found(model: Path, *words: object) -> dict[str, Any]:
    code, out, err = run(model, *words, "--json")
    assert code == 0, err
    made: dict[str, Any] = json.loads(out)
    return made


def planned(model: Path, preset: Path) -> Plan:
    return resolve_plan(load_preset(preset), open_source(model), Target("cpu"))


def test_second_search_makes_no_scores_and_loses_less_in_more_bits(
    model: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "found.yaml"
    first = found(model, *TEXT, *FEW, "--bits", 5, "--out", preset)
    assert first["scores_made"] > 0
    second = found(model, *TEXT, *FEW, "--bits", 6.5, "--out", preset)
    assert second["scores_made"] == 0
    assert 0 < second["point"]["loss"] < first["point"]["loss"]
    for made, bits in ((first, 5), (second, 6.5)):
        assert bits - 1 < made["point"]["bits"] <= bits
        assert 0 <= made["gap"] < 0.011
    # other methods, and only their scores
    third = found(model, *TEXT, "--bits", 8.6, "--methods", "fp8_channel", "--out", preset)
    assert third["scores_made"] == 0
    # another seed is another text
    other = found(model, *TEXT, *FEW, "--seed", 1, "--bits", 5, "--out", preset)
    assert other["scores_made"] == first["scores_made"]


def test_preset_is_held_to_its_budget_in_bytes_of_the_plan(model: Path, tmp_path: Path) -> None:
    preset = tmp_path / "found.yaml"
    made = found(model, *TEXT, *FEW, "--budget", "100KiB", "--out", preset)
    plan = planned(model, preset).check()
    held = rank_bytes(plan.layers, 1, plan.source.config)
    assert held == made["point"]["rank_bytes"] <= 100 * 1024
    assert held > 95 * 1024
    for unit, one in made["units"].items():
        layer = plan.modules[unit][0]
        assert (layer.scheme.label if layer.scheme else "") == one["scheme"]


def test_what_is_measured_stands_beside_what_is_predicted(model: Path, tmp_path: Path) -> None:
    preset, folder = tmp_path / "found.yaml", tmp_path / "converted"
    code, out, err = run(
        model, *TEXT, *FEW, "--bits", 6, "--out", preset, "--convert", folder, "--check"
    )
    assert code == 0, err
    pattern = r"measured KL (\S+) ± (\S+) nats a token, predicted (\S+) \(new text that the model"
    line = re.search(pattern, out)
    assert line is not None, out
    kl, error, predicted = map(float, line.groups())
    # the model is loud, its text short
    assert 0.3 * predicted < kl + 3 * error
    assert kl - 3 * error < 3 * predicted
    assert (folder / "mixedprec_calibration.json").exists()


def test_at_load_nothing_needs_a_conversion(model: Path, tmp_path: Path) -> None:
    preset = tmp_path / "found.yaml"
    nearest = found(model, *TEXT, *FEW, "--bits", 5, "--at-load", "--out", preset)
    assert planned(model, preset).check().not_calibrated() == []
    calibrated = found(model, *TEXT, *FEW, "--bits", 5, "--out", preset)
    assert planned(model, preset).check().not_calibrated()
    assert calibrated["point"]["loss"] < nearest["point"]["loss"]


def test_at_load_makes_no_scores_of_what_needs_a_conversion(model: Path, tmp_path: Path) -> None:
    words = (*TEXT, "--seed", 3, "--bits", 5, "--methods", "awq", "--out", tmp_path / "found.yaml")
    nearest = found(model, *words, "--at-load")["scores_made"]
    calibrated = found(model, *words)["scores_made"]
    assert nearest == calibrated > 0
    assert found(model, *words, "--at-load")["scores_made"] == 0


def test_init_goes_by_scores_that_are_there(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns(".mixedprec"))
    words = ["init", "--device", "cpu", "--model", str(copy), "--bits", "5.5"]
    assert "a rule of thumb from shapes alone" in commands.run(*words)[1]
    found(copy, "--at-load", "--bits", 5.5, "--methods", "awq,fp8", "--out", tmp_path / "a.yaml")
    preset = tmp_path / "mine.yaml"
    assert "chosen by scores of mixedprec search" in commands.run(*words, "--out", preset)[1]
    first, *rest = preset.read_text().splitlines()
    assert first.startswith("# yaml-language-server: $schema=")
    # the same schemes and rules, of which searches tell what they cost
    own = [line for line in (tmp_path / "a.yaml").read_text().splitlines() if line[0] != "#"]
    assert [line for line in rest if line[0] != "#"] == own
    # no size, no search
    assert "a rule of thumb from shapes alone" in commands.run(*words[:-2])[1]


def test_quantized_release_is_rounded_again_where_that_is_chosen(tmp_path: Path) -> None:
    folder = deepseek_v3(num_layers=4).write(tmp_path / "model")
    preset = tmp_path / "found.yaml"
    words = ["search", "--model", folder, *FEW, "--fast", "--bits", 5, "--out", preset]
    code, _, err = commands.run(*words)
    assert code == 0, err
    plan = resolve_plan(load_preset(preset), open_source(folder), Target()).check()
    actions = {layer.action for layer in plan.layers if layer.kind == "expert"}
    assert "requantize" in actions
    asked = {x.scheme.requantize for x in plan.layers if x.scheme and x.action == "requantize"}
    assert asked == {True}


def test_experts_of_a_quantized_release_stay_as_stored_one_by_one(tmp_path: Path) -> None:
    folder = deepseek_v3(num_layers=4).write(tmp_path / "model")
    choices = find_choices(open_source(folder), Target(), ["awq"])
    # every third expert is touchy
    scores = {
        unit: {name: score * (1000 if int(unit.split(".")[5]) % 3 == 0 else 1)
               for name, score in own.items()}
        for unit, own in guessed(choices).items() if ".experts." in unit
    }  # fmt: skip
    found = Search(choices).run(Budget(bits=6.0), scores, GUESSES)
    preset = tmp_path / "found.yaml"
    text = preset_text(found.choices, Chosen(found.choice, found.losses, []))
    plan = publish(text, found.choices, found.choice, preset)
    made = {
        (layer.action, layer.method, layer.shard.expert % 3 == 0)
        for layer in plan.layers
        if isinstance(layer.shard, ExpertShard)
    }
    assert made >= {("as stored", "fp8", True), ("requantize", "awq", False)}
    # by their method, as `auto` has all experts of a layer alike
    assert "method: fp8" in preset.read_text()
    layerwise = Search(choices, is_by_layer=True).run(Budget(bits=6.0), scores, GUESSES)
    assert layerwise.point.loss > found.point.loss


def test_read_only_checkpoint_has_its_scores_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns(".mixedprec"))
    (copy / ".mixedprec").write_text("in the way")
    monkeypatch.setenv("MIXEDPREC_CACHE", str(tmp_path / "cache"))
    made = found(copy, *TEXT, "--bits", 8.6, "--methods", "fp8", "--out", tmp_path / "a.yaml")
    assert made["scores_made"] == 6 * 2
    assert len(list((tmp_path / "cache" / "scores").glob("scores-*.json"))) == 1
    again = found(copy, *TEXT, "--bits", 8.6, "--methods", "fp8", "--out", tmp_path / "a.yaml")
    assert again["scores_made"] == 0


def test_sources_are_chosen_from_unless_scales_are_folded_into_their_norms(
    model: Path, tmp_path: Path
) -> None:
    scaled = tmp_path / "scaled"
    shutil.copytree(model, scaled, ignore=shutil.ignore_patterns(".mixedprec"))
    tensors = load_file(scaled / "model.safetensors")
    for name, tensor in tensors.items():
        if "input_layernorm" in name:
            tensors[name] = tensor * 2
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name] = tensor / 2
    save_file(tensors, scaled / "model.safetensors", {"format": "pt"})
    preset = tmp_path / "awq.yaml"
    preset.write_text("version: 1\nrules: [{match: '*', method: awq, group_size: 32}]\n")
    for name, folder in (("plain", model), ("folded", scaled)):
        commands.converted(folder, preset, tmp_path / name)
    sources = tmp_path / "sources.yaml"
    paths = "".join(f"  {x}: {{path: {tmp_path / x}}}\n" for x in ("plain", "folded", "scaled"))
    sources.write_text(f"version: 1\nsources:\n{paths}rules: [{{match: '*', method: auto}}]\n")
    path = tmp_path / "found.yaml"
    words = (*TEXT, "--seed", 2, "--bits", 4.7, "--at-load", "--methods", "awq", "--out", path)
    code, out, err = run(model, *words, "--sources", sources)
    assert code == 0, err
    assert "left out: source folded: " in out
    (file,) = [
        x for x in (model / ".mixedprec").glob("*.json")
        if json.loads(x.read_text())["facts"]["seed"] == 2
    ]  # fmt: skip
    unit = json.loads(file.read_text())["scores"]["model.layers.1.self_attn.qkv_proj"]
    scores = {tuple(re.findall(r'plain|scaled|"group_size": 32|nearest', k)): unit[k] for k in unit}
    # the same codes, rounded by a conversion and by the search
    assert scores["plain",] == pytest.approx(scores['"group_size": 32', "nearest"])
    # columns are multiplied by what its norm is larger: nothing is lost
    assert scores["scaled",] < 1e-9 * scores["plain",]


def test_single_experts_lose_less_than_whole_layers_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, "qwen3_moe")
    preset = tmp_path / "found.yaml"
    single, layer = (
        found(folder, *TEXT, *FEW, "--bits", 6, "--experts", how, "--out", preset)
        for how in ("single", "layer")
    )
    assert single["point"]["loss"] < layer["point"]["loss"]
    modules = {unit.rpartition(".")[0] for unit in layer["units"] if ".experts." in unit}
    assert len(modules) == 3
    for module in modules:
        schemes = {
            one["scheme"] for unit, one in layer["units"].items() if unit.startswith(f"{module}.")
        }
        assert len(schemes) == 1


def test_rule_of_thumb_reads_no_weights_and_says_what_it_is(tmp_path: Path) -> None:
    folder = qwen3_30b_a3b(num_layers=2).write(tmp_path / "moe")
    words = ["search", "--model", folder, *FEW, "--fast", "--gpu", "H100", "--bits", 5, "--out"]
    code, out, err = commands.run(*words, tmp_path / "found.yaml")
    assert code == 0, err
    assert "a rule of thumb from shapes alone" in out
    assert "rule of thumb" in (tmp_path / "found.yaml").read_text()


def test_card_that_holds_nothing_of_it_is_refused_with_what_fits(tmp_path: Path) -> None:
    folder = qwen3_30b_a3b(num_layers=3).write(tmp_path / "moe")
    words = ["search", "--model", folder, "--fast", "--gpu", "RTX4090", "--out", tmp_path / "x"]
    code, _, text = commands.run(*words, "--context", "32k", "--concurrency", 256)
    assert code == 1
    assert "RTX 4090 has 0.0 GB left for weights on a rank (expected" in text
    assert "256 requests x 32,768 tokens x 3 layers x 4 heads x (128 + 128) x 2 bytes" in text
    assert re.search(r"it fits with .*--tp \d", text), text
    assert not (tmp_path / "x").exists()
    code, out, err = commands.run(*words, "--context", "4k", "--tp", 2)
    assert code == 0, err
    assert "--mem-fraction-static" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # a fifth of the weights, of 96 inputs, not in groups of 64: 3.25, and 4.5 in nvfp4
        (
            ["--bits", "2"],
            r"2 bits a weight of linear layers is .* \(expected 3.51 or more\)",
        ),
        (["--budget", "50KiB"], r"less than anything takes \(expected .*GiB or more\)"),
        ([], "name one of --bits N, --budget SIZE, or --gpu NAME --context TOKENS"),
        (["--bits", "5", "--budget", "1GiB"], "--bits and --budget"),
        (["--context", "8k"], "--context: is for a GPU"),
        (["--bits", "5", "--concurrency", "4"], "add --context TOKENS"),
        (["--bits", "5", "--kv-cache-dtype", "auto"], "add --context TOKENS"),
        (["--bits", "5", "--methods", "awq,foo"], "'foo' is not known"),
        (
            ["--bits", "5", "--methods", "awk"],
            r"'awk' is not known \(expected .*\); did you mean 'awq'",
        ),
        (["--bits", "5", "--methods", "bf16"], "'bf16' quantizes nothing"),
        (["--bits", "5", "--windows", "3"], "--windows: is for scores, and --fast makes none"),
    ],
)
def test_what_does_not_go_is_refused(
    model: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    path = tmp_path / "found.yaml"
    code, _, err = run(model, "--fast", *words, "--out", path)
    assert code in (1, 2)
    assert re.search(message, err), err
    assert not path.exists()


@pytest.mark.parametrize("words", [["--bits", "2"], ["--budget", "50KiB"]])
def test_a_budget_that_nothing_fits_is_refused_before_anything_is_scored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("mixedprec_plugin.cli.search._scores", lambda *_: pytest.fail("scored"))
    code, _, err = run(model, *words, "--out", tmp_path / "found.yaml")
    assert code == 1
    assert "is less than anything takes (expected" in err
