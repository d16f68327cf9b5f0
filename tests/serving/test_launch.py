"""Launch options: what does not go with a preset is refused before a process is started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixedprec_plugin.errors import PlanError
from tests.checkpoints import write_llama, write_mixtral
from tests.presets import write_preset

DENSE = ('match: "*", method: fp8',)
ALIKE = ('match: "*.experts.*", method: fp8',)
BY_LAYER = (*ALIKE, 'match: "*.1.*.experts.*", method: int8')
BY_EXPERT = (*ALIKE, 'match: "*.experts.1.*", method: int8')
AWQ = ('match: "*.experts.*", method: awq',)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixtral(tmp_path_factory.mktemp("mixtral") / "model", num_hidden_layers=2)


def check(model: Path, rules: tuple[str, ...], *argv: str) -> list[str]:
    """What a server that is started like this would be refused for."""
    from sglang.srt.server_args import ServerArgs

    from mixedprec_plugin.serving.early import check_early
    from mixedprec_plugin.serving.flags import fold_flags

    preset = write_preset(model.parent / "presets", *rules)
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(
        ["--model-path", str(model), "--load-format", "mixedprec",
         "--mixedprec-config", str(preset), *argv]
    )  # fmt: skip
    try:
        check_early(fold_flags(args))
    except PlanError as error:
        return [str(problem) for problem in error.problems]
    return []


pytestmark = pytest.mark.usefixtures("sglang_context")

OTHER_LOADER = "it belongs to another load format"
OWN_READING = "the load format reads files by itself"
PAST = "tensors that come past the plan are not quantized by the preset"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--quantization", "fp8"), "--quantization: 'fp8': a preset names the method"),
        (("--model-impl", "transformers"), "--model-impl: 'transformers': a plan is made for"),
        (
            ("--startup-weight-load-mode", "overlap"),
            "--startup-weight-load-mode: 'overlap': SGLang overlaps loading with CUDA graphs",
        ),
        (("--weight-cache-mode", "client"), "--weight-cache-mode: 'client': the weight cache"),
        (
            ("--model-loader-extra-config", '{"num_threads": 4}'),
            f"--model-loader-extra-config: num_threads: {OWN_READING}",
        ),
        (("--model-loader-extra-config", '{"enable_multithread_load": true}'), OWN_READING),
        (("--remote-instance-weight-loader-seed-instance-ip", "10.0.0.1"), OTHER_LOADER),
        (("--remote-instance-weight-loader-seed-instance-service-port", "1"), OTHER_LOADER),
        (("--remote-instance-weight-loader-send-weights-group-ports", "[1]"), OTHER_LOADER),
        (("--remote-instance-weight-loader-backend", "transfer_engine"), OTHER_LOADER),
        (
            ("--remote-instance-weight-loader-start-seed-via-transfer-engine",),
            "an instance that copies these weights would have to know the plan",
        ),
        (("--modelexpress-config", "{}"), OTHER_LOADER),
        (("--rl-quant-profile", "x.pt"), OTHER_LOADER),
        (("--modelopt-quant", "fp8"), "ModelOpt quantizes a whole model"),
        (("--modelopt-checkpoint-restore-path", "x"), "ModelOpt quantizes a whole model"),
        (("--modelopt-checkpoint-save-path", "x"), "ModelOpt quantizes a whole model"),
        (("--modelopt-export-path", "x"), "ModelOpt quantizes a whole model"),
        (("--quantize-and-serve",), "ModelOpt quantizes a whole model"),
        (("--custom-weight-loader", "a.b"), f"--custom-weight-loader: ['a.b']: {PAST}"),
        (("--checkpoint-engine-wait-weights-before-ready",), "the server would wait for ever"),
        (("--enable-elastic-expert-backup",), PAST),
        (("--decrypted-config-file", "x"), "the plan is made from the checkpoint's own"),
        (("--offload-group-size", "4"), "by the names of unquantized parameters"),
        (
            ("--enforce-shared-experts-fusion",),
            "--enforce-shared-experts-fusion: True: a preset gives shared experts methods of the",
        ),
        (("--enable-waterfill",), "a preset gives shared experts methods of their own"),
        (
            ("--json-model-override-args", '{"quantization_config": {}}'),
            "--json-model-override-args: quantization_config: a preset names the method",
        ),
    ],
)
def test_option_that_changes_what_is_read_is_refused(
    llama: Path, argv: tuple[str, ...], message: str
) -> None:
    (problem,) = check(llama, DENSE, *argv)
    assert message in problem
    assert problem.endswith(("leave it out", f"start without {argv[0]}"))


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--weight-loader-disable-mmap",),
        ("--weight-loader-drop-cache-after-load",),
        ("--weight-loader-prefetch-checkpoints",),
        ("--json-model-override-args", '{"rope_theta": 1000.0}'),
        ("--cpu-offload-gb", "1"),
        ("--pp-size", "2"),
        ("--dp-size", "2"),
        ("--kv-cache-dtype", "fp8_e4m3"),
        ("--nnodes", "2", "--tp", "2", "--dist-init-addr", "127.0.0.1:1"),
    ],
)
def test_option_that_goes_is_let_through(llama: Path, argv: tuple[str, ...]) -> None:
    assert check(llama, DENSE, *argv) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--enable-lora",), "--enable-lora: True: SGLang keeps adapters in pinned memory"),
        (("--lora-paths", "a=/x"), "SGLang keeps adapters in pinned memory"),
        (("--speculative-algorithm", "NGRAM"), "NGRAM': SGLang's speculative decoding needs sgl-k"),
        (("--speculative-algorithm", "EAGLE"), "EAGLE': SGLang's speculative decoding needs sgl-k"),
        (("--enable-memory-saver",), "--enable-memory-saver: True: it frees the memory of a GPU"),
    ],
)
def test_option_that_a_cpu_has_no_means_for_is_refused(
    llama: Path, argv: tuple[str, ...], message: str
) -> None:
    (problem,) = check(llama, DENSE, *argv)
    assert message in problem


@pytest.mark.parametrize("rules", [ALIKE, BY_LAYER])
def test_experts_in_one_scheme_a_layer_may_be_split_by_expert(
    mixtral: Path, rules: tuple[str, ...]
) -> None:
    assert check(mixtral, rules, "--tp", "2", "--ep-size", "2") == []


def test_experts_of_one_layer_in_several_schemes_may_not_be_split_by_expert(mixtral: Path) -> None:
    (problem,) = check(mixtral, BY_EXPERT, "--tp", "2", "--ep-size", "2")
    assert problem.startswith("model.layers.0-1.block_sparse_moe.experts: --ep-size 2: expert")
    assert problem.endswith("start without it: tensor parallelism splits each expert")


@pytest.mark.parametrize("rules", [ALIKE, BY_EXPERT])
def test_dispatch_of_tokens_is_refused(mixtral: Path, rules: tuple[str, ...]) -> None:
    (problem,) = check(mixtral, rules, "--tp", "2", "--moe-a2a-backend", "deepep")
    assert "--moe-a2a-backend 'deepep': where a backend dispatches tokens" in problem


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (ALIKE, "SGLang measures and moves experts on GPUs"),
        (BY_LAYER, "needs all of them in one scheme"),
        (BY_EXPERT, "the expert balancer moves weights between experts"),
    ],
)
def test_balancing_of_experts_is_refused(
    mixtral: Path, rules: tuple[str, ...], message: str
) -> None:
    assert message in " ".join(check(mixtral, rules, "--enable-eplb"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (ALIKE, "the CPU platform runs experts in a loop of its own"),
        (AWQ, "SGLang does not run experts in awq in it (expected 'auto')"),
    ],
)
def test_explicit_backend_of_experts_is_refused(
    mixtral: Path, rules: tuple[str, ...], message: str
) -> None:
    assert message in " ".join(check(mixtral, rules, "--moe-runner-backend", "triton"))


def test_all_problems_of_a_launch_are_told_at_once(mixtral: Path) -> None:
    flags = ("--quantization", "fp8", "--enable-lora", "--ep-size", "2", "--tp", "2")
    assert len(check(mixtral, BY_EXPERT, *flags)) == 4


def test_draft_model_is_loaded_as_sglang_would(llama: Path) -> None:
    from safetensors.torch import load_file
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.model_loader.loader import get_model_loader

    from mixedprec_plugin.serving.loader import is_mixed_precision

    config = ModelConfig(str(llama), dtype="bfloat16", is_draft_model=True)
    # the preset of the model that it drafts for
    extra = {"mixedprec_config": "fp8-block"}
    load_config = LoadConfig(load_format="mixedprec", model_loader_extra_config=extra)
    loader = get_model_loader(load_config, config)
    model = loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
    assert not is_mixed_precision(model)
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(down.quant_method, UnquantizedLinearMethod)
    stored = load_file(llama / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert down.weight.equal(stored)


@pytest.mark.parametrize("is_said", [True, False])
def test_options_of_reading_reach_the_reader(is_said: bool) -> None:
    from sglang.srt.runtime_context import get_model

    from mixedprec_plugin.checkpoint.reader import Reading
    from mixedprec_plugin.serving.loader import _how_to_read

    said = {
        "weight_loader_disable_mmap": is_said, "weight_loader_drop_cache_after_load": is_said,
    }  # fmt: skip
    with get_model().override(**said):
        assert _how_to_read() == Reading(may_map=not is_said, drops_cache=is_said)


@pytest.mark.parametrize("is_said", [True, False])
def test_files_are_prefetched_by_sglang_if_that_is_asked_for(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_said: bool
) -> None:
    from sglang.srt.runtime_context import get_model

    caplog.set_level("DEBUG", "sglang.srt.model_loader.weight_utils")
    preset = write_preset(tmp_path, *DENSE)
    with get_model().override(weight_loader_prefetch_checkpoints=is_said):
        TestDraft().load(llama, preset, tmp_path / "plan.json", is_draft=False)
    assert ("prefetching 1/1 checkpoint shards" in caplog.text) == is_said


class TestDraft:
    """A draft model of speculative decoding, by the preset's section `draft`."""

    @pytest.fixture
    def preset(self, llama: Path, tmp_path: Path) -> Path:
        path = write_preset(tmp_path, *DENSE)
        draft = 'draft: {rules: [{match: "*.down_proj", method: fp8_block}]}\n'
        path.write_text(path.read_text() + draft)
        return path

    @pytest.fixture
    def forgetful(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever other tests loaded in this process was not loaded."""
        from mixedprec_plugin.serving import loader

        monkeypatch.setattr(loader, "_loaded", None)
        monkeypatch.setattr(loader, "_loaded_draft", None)

    @pytest.mark.usefixtures("forgetful")
    def test_section_says_what_the_draft_model_runs_in(
        self, llama: Path, preset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from safetensors.torch import load_file

        caplog.set_level("INFO")
        plan_path = tmp_path / "plan.json"
        model = self.load(llama, preset, plan_path, is_draft=False)
        draft = self.load(llama, preset, plan_path, is_draft=True)
        assert "the draft model, by the preset's section draft" in caplog.text
        down, up = (f"model.layers.1.mlp.{name}" for name in ("down_proj", "gate_up_proj"))
        assert draft.get_submodule(down).quant_method.quant_config.weight_block_size == [128, 128]
        stored = load_file(llama / "model.safetensors")
        gate = stored["model.layers.1.mlp.gate_proj.weight"]
        assert draft.get_submodule(up).weight[: len(gate)].equal(gate)
        # the model's own plan stays what it was
        assert model.get_submodule(down).quant_method.quant_config.weight_block_size is None
        methods = {x["name"]: x["method"] for x in json.loads(plan_path.read_text())["layers"]}
        assert methods["model.layers.1.mlp.gate_proj"] == "fp8"

    def load(self, path: Path, preset: Path, plan_path: Path, *, is_draft: bool) -> Any:
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.model_loader.loader import get_model_loader

        config = ModelConfig(str(path), dtype="bfloat16", is_draft_model=is_draft)
        extra = {"mixedprec_config": str(preset), "mixedprec_plan": str(plan_path)}
        load_config = LoadConfig(load_format="mixedprec", model_loader_extra_config=extra)
        loader = get_model_loader(load_config, config)
        return loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({}, "preset.yaml: draft: the draft model is made of layers of --model-path itself"),
            (
                {"speculative_draft_model_quantization": "fp8"},
                "--speculative-draft-model-quantization: 'fp8': the preset's section draft says",
            ),
            (
                {"speculative_draft_load_format": "dummy"},
                "--speculative-draft-load-format: 'dummy': the preset's section draft says how",
            ),
        ],
    )
    def test_launch_that_the_section_does_not_go_with_is_refused(
        self, llama: Path, preset: Path, tmp_path: Path, fields: dict[str, str], message: str
    ) -> None:
        found = self.problems(llama, preset, llama if not fields else tmp_path / "other", **fields)
        assert len(found) == 1
        assert message in found[0]

    def test_plan_of_the_draft_is_checked_at_start(
        self, llama: Path, preset: Path, tmp_path: Path
    ) -> None:
        other = write_llama(tmp_path / "other", intermediate_size=192)
        (problem,) = self.problems(llama, preset, other)
        assert problem.startswith("model.layers.0-2.mlp.down_proj: ")
        assert "192" in problem

    def problems(self, model: Path, preset: Path, draft: Path, **fields: str) -> list[str]:
        """What starting with a draft model finds, beside what a CPU has no means for."""
        from mixedprec_plugin.serving.early import check_early

        args = SimpleNamespace(
            load_format="mixedprec", model_path=str(model), dtype="bfloat16", tp_size=1,
            model_loader_extra_config={"mixedprec_config": str(preset)},
            speculative_algorithm="STANDALONE", speculative_draft_model_path=str(draft), **fields,
        )  # fmt: skip
        with pytest.raises(PlanError) as caught:
            check_early(args)
        texts = [str(problem) for problem in caught.value.problems]
        return [text for text in texts if "needs sgl-kernel" not in text]


class TestStage:
    """The placeholders of a pipeline stage, as SGLang builds them."""

    @pytest.fixture
    def layers(self, llama: Path) -> SimpleNamespace:
        from tests.presets import plan

        made = plan(llama, *DENSE)
        return SimpleNamespace(tied=made.tied, planned={x.name: x for x in made.layers})

    def model(self, **modules: object) -> object:
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
        self, layers: SimpleNamespace
    ) -> None:
        import torch

        from mixedprec_plugin.serving.stages import Stage

        stage = Stage(self.model(lm_head=torch.nn.Identity()), layers.tied)
        read = {name for name, layer in layers.planned.items() if stage.runs(layer)}
        assert "model.embed_tokens" in read
        assert not any(name.startswith("model.layers.0.") for name in read)
        assert "model.layers.1.mlp.up_proj" in read
        assert stage.describe(layers.planned.values()).startswith("this pipeline stage reads ")

    def test_stage_that_has_no_head_does_not_read_the_embedding(
        self, layers: SimpleNamespace
    ) -> None:
        from sglang.srt.layers.utils.common import PPMissingLayer

        from mixedprec_plugin.serving.stages import Stage

        stage = Stage(self.model(lm_head=PPMissingLayer()), layers.tied, is_last=False)
        assert not stage.runs(layers.planned["model.embed_tokens"])

    def test_last_stage_without_a_head_is_refused(self, layers: SimpleNamespace) -> None:
        from mixedprec_plugin.errors import LoadError
        from mixedprec_plugin.serving.stages import Stage

        model = self.model()
        model.lm_head = model.model.embed_tokens  # type: ignore[attr-defined]
        with pytest.raises(LoadError, match="gives the last stage no head of its own; start wit"):
            Stage(model, layers.tied)

    def test_model_that_sglang_does_not_split_is_refused(self, layers: SimpleNamespace) -> None:
        import torch

        from mixedprec_plugin.errors import LoadError
        from mixedprec_plugin.serving.stages import Stage

        with pytest.raises(LoadError, match="--pp-size 2: SGLang's Module is not split into pip"):
            Stage(torch.nn.Module(), layers.tied, num_stages=2)
