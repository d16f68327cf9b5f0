"""The main job: a preset decides each layer's method, and a real server answers with it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.reference_model import load_unquantized, log_probabilities
from mixedprec_plugin.calibrate.text import read_text
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.evaluate.engine import distributions
from mixedprec_plugin.evaluate.report import evaluate
from mixedprec_plugin.evaluate.server import Server, ServerError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.render import summary_lines
from tests import commands
from tests.presets import open_virtual_checkpoint, plan, write_preset
from tests.server.conftest import API_KEY, MIXED, Mixed, chat, generate, greedy, nearness


def test_server_answers_over_the_openai_api(mixed: Mixed) -> None:
    assert "Paris" in chat(mixed.server)


def test_log_shows_the_plan(mixed: Mixed, widened_model: Path) -> None:
    log = mixed.log_path.read_text()
    assert f"mixedprec: {MIXED} over {widened_model}" in log
    assert "model.layers.18-22.mlp.gate_up_proj  awq (awq 4-bit g128)  quantize" in log
    assert "model.layers.6-8.self_attn.qkv_proj  fp8  quantize" in log


def test_plan_file_says_what_runs(mixed: Mixed) -> None:
    made = json.loads(mixed.plan_path.read_text())
    methods = {layer["name"]: layer["method"] for layer in made["layers"]}
    numbers = (0, 6, 9, 12, 15, 18, 23, 24, 27, 28, 29)
    assert [methods[f"model.layers.{n}.mlp.up_proj"] for n in numbers] == [
        "fp8", "fp8", "fp8_channel", "int8_channel", "blockwise_int8", "awq", "humming",
        "gptq", "gptq", "nvfp4", "bf16",
    ]  # fmt: skip
    assert made["target"] == {
        "device": "cpu", "tp_size": 1, "dtype": "BF16", "gpu": None
    }  # fmt: skip


class TestRunning:
    """What the server says of itself."""

    def test_plan_is_the_one_that_the_ranks_loaded(self, mixed: Mixed) -> None:
        """Which another process made and wrote, at the start."""
        assert mixed.server.request("/mixedprec/plan") == json.loads(mixed.plan_path.read_text())

    @pytest.mark.parametrize("path", ["/mixedprec/plan", "/mixedprec/plan/document"])
    def test_addresses_ask_for_the_key_that_others_ask_for(self, mixed: Mixed, path: str) -> None:
        for wrong in ({}, {"Authorization": "Bearer wrong"}):
            answers = [httpx.get(f"{mixed.server.address}{p}", headers=wrong) for p in
                       (path, "/server_info")]  # fmt: skip
            assert [answer.status_code for answer in answers] == [401, 401]

    def test_metrics_tell_preset_and_bytes_by_method(self, mixed: Mixed) -> None:
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(
                httpx.get(f"{mixed.server.address}/metrics", follow_redirects=True).text
            )
            if family.name.startswith("mixedprec_")
            for sample in family.samples
        }
        made = json.loads(mixed.plan_path.read_text())
        expected = {("mixedprec_info", *sorted(["mixed", made["preset"]["digest"]])): 1.0}
        for layer in made["layers"]:
            key = ("mixedprec_weight_bytes", layer["method"])
            expected[key] = expected.get(key, 0.0) + layer["bytes"]
        assert samples == expected

    def test_diff_and_the_page_read_it(
        self, mixed: Mixed, widened_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = write_preset(tmp_path, 'match: "*.layers.0.*_proj", method: gptq')
        said = ("--model", widened_model, "--device", "cpu")
        diff = ("diff", other, mixed.server.address, *said)
        code, _, err = commands.run(*diff)
        assert code == 2
        assert "set MIXEDPREC_API_KEY to the server's --api-key" in err
        monkeypatch.setenv("MIXEDPREC_API_KEY", API_KEY)
        beside = commands.run("diff", other, MIXED, *said, "--json")
        assert beside[0] == 0
        assert commands.run(*diff, "--json") == beside
        pages = []
        for against in (mixed.server.address, MIXED):
            page = tmp_path / "plan.html"
            argv = ("plan", *said, "--preset", other, "--html", page, "--against", against)
            assert commands.run(*argv)[0] == 0
            pages.append(page.read_text(encoding="utf-8"))
        assert pages[0] == pages[1]


def test_distributions_are_those_of_independently_dequantized_weights(
    mixed: Mixed, widened_model: Path, prose: str
) -> None:
    near = nearness(mixed.server, widened_model, MIXED, prose)
    assert near.divergence < 0.01
    assert abs(near.loss) < 0.01


def test_eval_measures_what_the_server_itself_predicts(
    mixed: Mixed, widened_model: Path, prose: str, tmp_path: Path
) -> None:
    """In two windows; the expectation is the server's own rows beside one run of transformers."""
    text = tmp_path / "prose.txt"
    text.write_text(prose, encoding="utf-8")
    plans = {"mixed": open_virtual_checkpoint(widened_model, MIXED, Target(device="cpu")).plan}
    servers = {name: lambda _: nullcontext(mixed.server) for name in ("(unquantized)", "mixed")}
    found = evaluate(
        plans,
        open_source(widened_model),
        text,
        2,
        100,
        0,
        tmp_path,
        Progress(disable=True),
        servers,
    )
    assert found[0].found == found[1].found
    tokenizer = AutoTokenizer.from_pretrained(widened_model)
    model = load_unquantized(widened_model)
    windows = read_text(text, tokenizer, 2, 100).tolist()
    expected = []
    for tokens in windows:
        ours = log_probabilities(model, tokens)
        rows = [torch.from_numpy(x) for _, x in distributions(mixed.server, tokens, ours.shape[1])]
        expected.append(float((ours.exp() * (ours - torch.cat(rows))).sum(-1).mean()))
    assert found[1].found.windows == pytest.approx(expected, rel=1e-3)
    assert found[1].found.kl.error is not None


class TestUpdateWeightsFromDisk:
    TEXT = "The three primary colors are"

    @pytest.fixture
    def other_weights(self, widened_model: Path, tmp_path: Path) -> Path:
        """The same model with two layers' MLPs exchanged."""
        folder = tmp_path / "other"
        shutil.copytree(widened_model, folder)
        tensors = load_file(widened_model / "model.safetensors")
        for name in [n for n in tensors if n.startswith("model.layers.3.mlp.")]:
            twin = name.replace("layers.3.", "layers.20.")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    def logprobs(self, mixed: Mixed) -> list[float]:
        answer = generate(mixed.server, self.TEXT, max_new_tokens=12)
        return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]

    def test_new_weights_are_quantized_by_the_preset_and_old_ones_come_back(
        self, mixed: Mixed, widened_model: Path, other_weights: Path
    ) -> None:
        before = self.logprobs(mixed)
        mixed.server.update_weights(other_weights)
        changed = self.logprobs(mixed)
        assert changed != before
        mixed.server.update_weights(widened_model, load_format="auto")
        assert self.logprobs(mixed) == before

    def test_weights_that_do_not_fit_leave_the_server_as_it_was(
        self, mixed: Mixed, original_model: Path, other_weights: Path
    ) -> None:
        before = self.logprobs(mixed)
        with pytest.raises(ServerError, match="K = 576"):
            mixed.server.update_weights(original_model)
        tensors = load_file(other_weights / "model.safetensors")
        tensors["model.layers.29.mlp.down_proj.weight"][0, 0] = torch.nan
        save_file(tensors, other_weights / "model.safetensors", {"format": "pt"})
        with pytest.raises(ServerError, match=r"model\.layers\.29\.mlp\.down_proj\.weight: 1 of"):
            mixed.server.update_weights(other_weights)
        assert self.logprobs(mixed) == before


@pytest.fixture(scope="module")
def converted(widened_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    return commands.converted(widened_model, MIXED, out, "--max-shard-size", "50MB")


class TestConverted:
    """The same preset, written to disk first."""

    PROMPTS = (
        "The capital of France is",
        "Once upon a time there was a little girl who",
        "The three primary colors are",
    )

    def test_checkpoint_gives_the_tokens_of_the_direct_load(
        self, mixed: Mixed, converted: Path, tmp_path: Path
    ) -> None:
        direct = {prompt: greedy(mixed.server, prompt) for prompt in self.PROMPTS}
        flags = ["--load-format", "mixedprec"]
        with Server(converted, tmp_path / "server.log", flags=flags) as server:
            assert {prompt: greedy(server, prompt) for prompt in self.PROMPTS} == direct

    def test_checkpoint_may_be_the_new_weights(
        self, mixed: Mixed, widened_model: Path, converted: Path
    ) -> None:
        before = greedy(mixed.server, self.PROMPTS[0])
        for path, action in ((converted, "as stored"), (widened_model, "quantize")):
            mixed.server.update_weights(path)
            assert greedy(mixed.server, self.PROMPTS[0]) == before
            layers = mixed.server.request("/mixedprec/plan")["layers"]
            assert {x["action"] for x in layers if x["method"] == "gptq"} == {action}


def test_greedy_output_is_repeatable(mixed: Mixed) -> None:
    first, second = (greedy(mixed.server, "Water boils at") for _ in range(2))
    assert first == second


def test_summary_fits_one_screen(widened_model: Path) -> None:
    made = plan(
        widened_model, 'match: "*", method: gptq', 'match: "*.self_attn.*", method: fp8_block'
    )
    assert len(summary_lines(made)) <= 24
