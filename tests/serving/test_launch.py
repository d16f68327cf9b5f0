"""Launch options: what does not go with a preset is refused before a process is started."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixedprec_plugin.errors import PlanError
from tests.checkpoints import write_mixtral
from tests.presets import write_preset

DENSE = ('match: "*", method: fp8',)
ALIKE = ('match: "*.experts.*", method: fp8',)
BY_LAYER = (*ALIKE, 'match: "*.1.*.experts.*", method: int8')
BY_EXPERT = (*ALIKE, 'match: "*.experts.1.*", method: int8')
AWQ = ('match: "*.experts.*", method: awq',)


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


@pytest.mark.parametrize("rules", [ALIKE, BY_LAYER, BY_EXPERT])
def test_experts_may_be_spread_over_ranks_whole(mixtral: Path, rules: tuple[str, ...]) -> None:
    assert check(mixtral, rules, "--tp", "2", "--ep-size", "2") == []


@pytest.mark.parametrize("rules", [ALIKE, BY_EXPERT])
def test_dispatch_of_tokens_is_refused(mixtral: Path, rules: tuple[str, ...]) -> None:
    (problem,) = check(mixtral, rules, "--tp", "2", "--moe-a2a-backend", "deepep")
    assert "--moe-a2a-backend 'deepep': behind it experts run in block FP8 alone" in problem


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


def kv_dtype(model: Path, said: str, *argv: str) -> str:
    """What a server that is started like this keeps its KV cache in."""
    from sglang.srt.server_args import ServerArgs

    preset = write_preset(model.parent / "presets", *DENSE, head=f"kv_cache: {{{said}}}\n")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(
        parser.parse_args(
            ["--model-path", str(model), "--load-format", "mixedprec", "--device", "cpu",
             "--mixedprec-config", str(preset), *argv]
        )
    )  # fmt: skip
    args.resolve_once()
    return str(args.kv_cache_dtype)


@pytest.mark.parametrize(
    ("said", "argv", "expected"),
    [
        ("dtype: fp8_e4m3", (), "fp8_e4m3"),
        ("dtype: fp8_e5m2", ("--kv-cache-dtype", "fp8_e5m2"), "fp8_e5m2"),
        ("dtype: auto", ("--kv-cache-dtype", "fp8_e4m3"), "fp8_e4m3"),
        ("scales: none", (), "auto"),
    ],
)
def test_kv_cache_is_in_the_dtype_of_the_preset(
    llama: Path, said: str, argv: tuple[str, ...], expected: str
) -> None:
    assert kv_dtype(llama, said, *argv) == expected


def test_option_that_contradicts_the_presets_kv_cache_is_refused(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        kv_dtype(llama, "dtype: fp8_e4m3", "--kv-cache-dtype", "bf16")
    told = capsys.readouterr().err
    assert "kv_cache.dtype: is 'fp8_e4m3', and --kv-cache-dtype is 'bf16'; leave one" in told


def test_all_problems_of_a_launch_are_told_at_once(mixtral: Path) -> None:
    flags = ("--quantization", "fp8", "--enable-lora", "--ep-num-redundant-experts", "2",
             "--ep-size", "2", "--tp", "2")  # fmt: skip
    assert len(check(mixtral, BY_EXPERT, *flags)) == 4


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
    load_model: Callable[..., Any],
    llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_said: bool,
) -> None:
    from sglang.srt.runtime_context import get_model

    caplog.set_level("DEBUG", "sglang.srt.model_loader.weight_utils")
    preset = write_preset(tmp_path, *DENSE)
    with get_model().override(weight_loader_prefetch_checkpoints=is_said):
        load_model(llama, preset, mixedprec_plan=str(tmp_path / "plan.json"))
    assert ("prefetching 1/1 checkpoint shards" in caplog.text) == is_said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dp-size", "2"), "--dp-size: 2: every rank of one replica must see the same tokens"),
        (("--tp", "2", "--attn-dp-size", "2"), "--attn-dp-size: 2: every rank of one replica"),
        (("--init-expert-location", "there"), "--init-expert-location: 'there': experts that are"),
    ],
)
def test_option_that_inputs_are_not_gathered_under_is_refused(
    llama: Path, argv: tuple[str, ...], message: str
) -> None:
    asked = ("--mixedprec-inputs", "inputs")
    assert check(llama, DENSE, *asked) == []
    assert [text for text in check(llama, DENSE, *asked, *argv) if text.startswith(message)]
    assert check(llama, DENSE, *argv) == []


def test_inputs_are_gathered_on_a_gpu_where_prompts_run_in_no_graphs(llama: Path) -> None:
    from sglang.srt.server_args import ServerArgs

    from mixedprec_plugin.serving.flags import fold_flags
    from mixedprec_plugin.serving.options import why_not_options

    def refused(*argv: str) -> list[str]:
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        said = ["--model-path", str(llama), "--load-format", "mixedprec", *argv]
        return [str(one) for one in why_not_options(fold_flags(parser.parse_args(said)), "cuda")]

    asked = ("--mixedprec-inputs", "inputs")
    text = (
        "--mixedprec-inputs: prompts run in CUDA graphs, where no layer's inputs are seen; add "
        "--cuda-graph-backend-prefill disabled"
    )
    assert refused() == []
    assert refused(*asked) == [text]
    assert refused(*asked, "--cuda-graph-backend-decode", "disabled") == [text]
    for off in (
        ("--cuda-graph-backend-prefill", "disabled"),
        ("--disable-prefill-cuda-graph",),
        ("--cuda-graph-config", '{"prefill": {"backend": "disabled"}}'),
    ):
        assert refused(*asked, *off) == []


def test_sglang_is_asked_for_hooks_where_inputs_are_to_be_gathered() -> None:
    from mixedprec_plugin.serving.options import ask_for_hooks

    def hooks(given: Any, **said: str) -> Any:
        args = argparse.Namespace(forward_hooks=given, model_loader_extra_config=said)
        ask_for_hooks(args)
        ask_for_hooks(args)  # SGLang may resolve what another process resolved
        return args.forward_hooks

    users = {"name": "users", "target_modules": ["*"], "hook_factory": "a:b"}
    assert hooks(None, mixedprec_config="awq") is None
    assert hooks([users], mixedprec_config="awq") == [users]
    first, ours = hooks([users], mixedprec_inputs="there", mixedprec_inputs_tokens="640")
    assert first == users
    assert ours["config"] == {"folder": "there", "num_tokens": 640}
