"""Plans for a GPU that is known: what it does not run or hold is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.memory import memory_lines, rank_bytes, usual_load
from mixedprec_plugin.plan.model import Plan
from tests.checkpoints import write_llama
from tests.presets import plan, problem_texts
from tests.published import mixtral_8x7b, qwen3_30b_a3b


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def on(gpu: str, model: Path, *lines: str, tp_size: int = 1, dtype: str = "BF16") -> Plan:
    return plan(model, *lines, target=Target("cuda", tp_size, dtype, find_gpu(gpu)))


def test_gpu_without_the_methods_kernels_is_an_error_that_names_all_layers(model: Path) -> None:
    (problem,) = on("T4", model, 'match: "*.mlp.*_proj", method: gptq', dtype="F16").errors
    assert problem.rule == "gpu"
    assert problem.where == ", ".join(
        f"model.layers.0-2.mlp.{name}_proj" for name in ("down", "gate", "up")
    )
    assert problem.what == (
        "gptq does not run on this GPU, whose compute capability is 7.5 (expected 8.0 or more)"
    )
    assert problem.remedy == "use method: awq or unquantized"


@pytest.mark.parametrize("gpu", ["A100", "RTX 3090", "RTX 4090", "H100", "B200", "RTX 5090"])
@pytest.mark.parametrize("method", ["fp8", "fp8_block", "blockwise_int8", "awq", "gptq"])
def test_gpu_that_runs_the_method_changes_nothing(model: Path, gpu: str, method: str) -> None:
    rule = f'match: "*_proj", method: {method}'
    assert problem_texts(on(gpu, model, rule)) == problem_texts(plan(model, rule))


def test_shape_that_only_this_gpu_refuses_is_an_error_only_there(tmp_path: Path) -> None:
    # 96 outputs: a multiple of 16, as FP8 units need, and of no Marlin tile
    ragged = write_llama(tmp_path / "ragged", intermediate_size=96)
    rule = 'match: "*.mlp.*_proj", method: fp8'
    assert not on("H100", ragged, rule).errors
    assert {problem.rule for problem in on("A100", ragged, rule).errors} == {"gpu"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_30b_a3b().write(tmp_path_factory.mktemp("mixture") / "model")


def test_experts_in_fp8_need_fp8_units(tmp_path: Path) -> None:
    mixture = qwen3_30b_a3b(num_layers=2).write(tmp_path / "model")
    rule = 'match: "*.experts.*", method: fp8'
    assert not on("H100", mixture, rule).errors
    (problem,) = on("A100", mixture, rule).errors
    assert re.search(r"fp8 for experts runs in a Triton kernel .* is 8\.0 ", problem.what)


def test_dtype_that_the_gpu_lacks_is_not_recommended(model: Path) -> None:
    (problem,) = on("T4", model, 'match: "*", method: bf16', dtype="F16").errors
    assert str(problem).endswith(
        "the model runs in float16, not in bf16; write method: unquantized"
    )


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtral_8x7b().write(tmp_path_factory.mktemp("mixtral") / "model")


def test_weights_that_the_gpu_does_not_hold_are_an_error(mixtral: Path) -> None:
    # Mistral AI: 46.7 billion parameters
    (problem,) = on("H100", mixtral, 'match: "*", method: unquantized').errors
    assert problem.rule == "memory"
    assert str(problem) == (
        "--gpu: the weights do not fit: 93.4 GB a rank on H100 of 80 GB; use method: fp8 for all "
        "linear layers, 47 GB a rank, or --tp 2"
    )
    rule = 'match: "*.experts.*", method: gptq'
    assert not on("H100", mixtral, rule).errors
    assert not on("H100", mixtral, 'match: "*", method: unquantized', tp_size=2).errors


@pytest.mark.slow
def test_weights_without_room_for_a_cache_are_an_error(mixture: Path) -> None:
    """SGLang keeps more than the rest for activations."""
    rules = (
        'match: "*.experts.*", method: gptq, group_size: 32',
        'match: "*.self_attn.*", method: fp8',
    )
    (problem,) = on("RTX 4090", mixture, *rules).errors
    assert problem.rule == "memory-reserve"
    assert str(problem) == (
        "--gpu: SGLang would not start: 19.1 GB of weights a rank and 7.6 GB for activations and "
        "CUDA graphs leave no room for a KV cache on RTX 4090 of 24 GB; use --tp 2, or "
        "--mem-fraction-static 0.9, which leaves less for activations"
    )
    assert not on("RTX 4090", mixture, *rules, tp_size=2).errors


@pytest.mark.slow
def test_lines_of_memory_add_up_to_the_card(mixture: Path) -> None:
    rules = ('match: "*_proj", method: awq', 'match: "*.self_attn.*", method: fp8')
    made = on("A6000", mixture, *rules)
    assert not made.errors
    title, *lines = memory_lines(made, usual_load(made.preset))
    assert title == "RTX A6000 of 48 GB, per rank (--tp 1):"
    sizes = [float(line.split(" GB")[0]) for line in lines[:3]]
    assert sum(sizes) == pytest.approx(48, abs=0.2)
    # 4 key and value heads of 128, 48 layers, 2 bytes
    tokens = int(lines[2].split(": ")[1].split(" tokens")[0].replace(",", ""))
    assert tokens == pytest.approx(sizes[2] * 1e9 / (2 * 4 * 128 * 48 * 2), rel=0.01)
    # 8 of 128 experts are read
    assert re.search(r"which reads 2\.\d GB of weights", lines[3])
    assert lines[4].startswith("  fp8 is weight-only on RTX A6000, which has no units for it")
    newer = on("H100", mixture, 'match: "*.self_attn.*", method: fp8')
    assert not any("weight-only" in x for x in memory_lines(newer, usual_load(newer.preset)))


@pytest.mark.sglang
@pytest.mark.filterwarnings("ignore")
def test_states_of_linear_attention_get_what_sglang_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama(
        tmp_path / "hybrid", full_attention_interval=4, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_conv_kernel_dim=4, num_hidden_layers=4,
    )  # fmt: skip
    made = on("RTX 4090", model, 'match: "*", method: unquantized')
    _, weights, reserve, states, cache = memory_lines(made, usual_load(made.preset))[:5]
    room = 24e9 - sum(float(line.split(" GB")[0]) * 1e9 for line in (weights, reserve))
    state = 3 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)
    left, slots, a_request = _of_sglang(monkeypatch, room / 2**30, state)
    # sizes are printed to a tenth of a GB
    count, _, each = states.partition("linear attention: ")[2].partition(", ")
    assert int(count.replace(",", "")) == pytest.approx(slots + 1, rel=0.01)
    assert each == f"{a_request} a request"
    assert float(cache.split(" GB")[0]) == pytest.approx(left * 2**30 / 1e9, abs=0.11)
    heads, size = made.source.config["num_key_value_heads"], made.source.config["head_dim"]
    tokens = int(cache.split(": ")[1].split(" tokens")[0].replace(",", ""))
    assert tokens == pytest.approx(left * 2**30 / (heads * 2 * size * 2), rel=0.01)
    # as many requests as states allow, and not as many as the cache does
    most = int(cache.partition("tokens, ")[2].split(" requests")[0].replace(",", ""))
    assert most == pytest.approx(min(slots // a_request, tokens // 8192), abs=1)


def _of_sglang(monkeypatch: pytest.MonkeyPatch, room: float, state: int) -> tuple[float, int, int]:
    """GiB that are left for keys and values, states, and states of a request: SGLang's own code."""
    from sglang.srt.mem_cache import kv_cache_configurator as theirs

    schedule = SimpleNamespace(
        max_mamba_cache_size=None, max_running_requests=None, mamba_full_memory_ratio=0.9
    )
    context = SimpleNamespace(override=lambda _name, **found: schedule.__dict__.update(found))
    mamba = SimpleNamespace(enable_linear_replayssm_spec=False, enable_mamba_extra_buffer=False)
    found = {
        "get_schedule": schedule, "get_context": context, "get_exec": SimpleNamespace(mamba=mamba),
        "get_memory": SimpleNamespace(disable_radix_cache=False),
    }  # fmt: skip
    for name, value in found.items():
        monkeypatch.setattr(theirs, name, lambda value=value: value)
    params = SimpleNamespace(layers=[0, 1, 2], mamba_cache_per_req=state)
    server = SimpleNamespace(
        mambaish_config=SimpleNamespace(mamba2_cache_params=params), pp_size=1,
        fused_entry_bytes=lambda _: None, spec_algorithm=SimpleNamespace(is_none=lambda: True),
        hybrid_gdn_config=None, hybrid_kda_config=None, extra_mamba_cache_bytes_per_req=0,
    )  # fmt: skip
    own = next(
        x
        for x in vars(theirs).values()
        if isinstance(x, type) and hasattr(x, "_handle_max_mamba_cache")
    )
    left = own._handle_max_mamba_cache(server, room)
    return left, schedule.max_mamba_cache_size, own._calculate_mamba_ratio(server)


def test_memory_is_not_judged_where_it_is_not_known(mixtral: Path) -> None:
    assert not on("9.0", mixtral, 'match: "*", method: unquantized').errors


def test_ranks_split_matrices_and_repeat_few_heads(model: Path) -> None:
    made = plan(model, 'match: "*", method: unquantized')
    hidden, inner, head = 256, 512, 64
    norms = 7 * hidden
    rank = 2 * norms
    # query and output, gate, up and down over 4 ranks; 2 key and 2 value heads over 2 ranks
    rank += 3 * 2 * (2 * 256 * hidden + 3 * inner * hidden) // 4
    rank += 3 * 2 * (2 * 2 * head * hidden) // 2
    rank += 2 * 320 * hidden // 4
    assert rank_bytes(made.layers, 4, made.source.config) == rank
    assert rank_bytes(made.layers, 1, made.source.config) == made.bytes_after


def test_layers_for_a_draft_model_take_no_memory(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", num_hidden_layers=3)
    whole = plan(model, 'match: "*", method: unquantized')
    config = dict(whole.source.config, num_hidden_layers=2, num_nextn_predict_layers=1)
    (model / "config.json").write_text(json.dumps(config))
    made = plan(model, 'match: "*", method: unquantized')
    last = [x.bytes_after for x in whole.layers if x.name.startswith("model.layers.2.")]
    assert rank_bytes(made.layers, 1, config) == whole.bytes_after - sum(last)
