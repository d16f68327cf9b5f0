"""What only a whole server on a real GPU shows: graphs, experts, new weights, adapters, drafts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.quality import QUANTIZED_INPUT_LIMIT, WEIGHT_ONLY_LIMIT
from benchmarks.reference_model import divergence
from mixedprec_plugin.evaluate.server import Server, ServerError
from tests.gpu.adapters import adapt, write_adapter
from tests.gpu.serving import (
    PROMPTS,
    Adapted,
    Continuation,
    agreement,
    check_same,
    continuations,
    expected,
    flush,
    is_rehearsal,
    near_tie,
    serve,
)
from tests.presets import write_preset
from tests.server.conftest import MIXED, chat

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("machine")]
_ROOT = Path(__file__).resolve().parents[2]
EXPERTS = _ROOT / "tests" / "server" / "experts.yaml"
EXPERTS_WEIGHT_ONLY = _ROOT / "tests" / "server" / "experts_weight_only.yaml"


def graphs_ran(server: Server) -> bool:
    """Whether decoding replayed captured graphs, by the server's own log; True in a rehearsal."""
    log = server.log_path.read_text(errors="replace")
    lines = [line for line in log.splitlines() if "Decode batch" in line]
    assert lines, server.log_tail()
    return is_rehearsal() or any("cuda graph: True" in line for line in lines)


CELLS = {
    "every-method": ("widened_model", MIXED, QUANTIZED_INPUT_LIMIT),
    "four-expert-schemes": ("experts_model", EXPERTS, QUANTIZED_INPUT_LIMIT),
    "four-weight-only-expert-schemes": ("experts_model", EXPERTS_WEIGHT_ONLY, WEIGHT_ONLY_LIMIT),
    "stock-bf16-experts": ("experts_model", None, WEIGHT_ONLY_LIMIT),
}


@pytest.mark.parametrize("name", CELLS)
def test_graphs_and_eager_decode_what_dequantized_weights_say(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, prose: str, report: list[str]
) -> None:
    shape, preset, limit = CELLS[name]
    model: Path = request.getfixturevalue(shape)
    with serve(model, tmp_path / "graphs.log", preset) as server:
        answer = chat(server)
        replayed = continuations(server)
        is_replayed = graphs_ran(server)
        dequantized = expected(model, preset, prose)
        near = dequantized.nearness(dequantized.served(server), limit)
    report.append(f"{name}: {near}, answers {answer!r}")
    with serve(model, tmp_path / "eager.log", preset, with_graphs=False) as server:
        eager = continuations(server)
    same = agreement(replayed, eager)
    report.append(f"{name}, graphs and eager: {same}")
    assert near.is_within, f"{near}; {same}"
    assert same.is_explained(limit), f"{same} (expected at most {near_tie(limit):.3f})"
    assert is_replayed, "no graph was replayed while decoding"
    assert "Paris" in answer, answer


def update(server: Server, path: Path) -> str:
    """Ask for new weights; what the server says against it, empty if it took them."""
    try:
        server.update_weights(path)
    except ServerError as error:
        return str(error)
    return ""


@pytest.fixture
def other_weights(dense: Path, tmp_path: Path) -> Path:
    """The same model with the MLPs of two pairs of layers exchanged."""
    folder = tmp_path / "other"
    shutil.copytree(dense, folder)
    tensors = load_file(dense / "model.safetensors")
    for one, other in ((3, 20), (12, 25)):
        for name in [n for n in tensors if n.startswith(f"model.layers.{one}.mlp.")]:
            twin = name.replace(f"layers.{one}.", f"layers.{other}.")
            tensors[name], tensors[twin] = tensors[twin], tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_new_weights_are_served_and_old_ones_come_back(
    dense: Path, other_weights: Path, tmp_path: Path, report: list[str]
) -> None:
    preset = write_preset(
        tmp_path / "presets",
        'match: "*", method: unquantized',
        'match: "*.layers.{0..19}.*_proj", method: fp8_block',
    )
    with serve(dense, tmp_path / "updated.log", preset) as server:
        before = continuations(server)
        assert update(server, other_weights) == ""
        changed = continuations(server)
        assert update(server, dense) == ""
        after = continuations(server)
    with serve(other_weights, tmp_path / "fresh.log", preset) as server:
        fresh = continuations(server)
    assert agreement(before, changed).num_equal < len(PROMPTS)
    limit = QUANTIZED_INPUT_LIMIT
    check_same(changed, fresh, limit, "new weights, updated and fresh", report)
    check_same(before, after, limit, "old weights, before and after", report)


def test_new_weights_that_marlin_cannot_take_are_refused(
    dense: Path, other_weights: Path, tmp_path: Path, report: list[str]
) -> None:
    if is_rehearsal():
        pytest.skip("on a CPU every layer takes new weights")
    with serve(dense, tmp_path / "server.log", MIXED) as server:
        before = continuations(server)
        refusal = update(server, other_weights)
        after = continuations(server)
    report.append(f"new weights for Marlin: {refusal[:300]}")
    assert "takes no new weights" in refusal, refusal
    check_same(before, after, QUANTIZED_INPUT_LIMIT, "refused weights, before and after", report)


ADAPTED = {"every-method": (MIXED, QUANTIZED_INPUT_LIMIT), "stock-bf16": (None, WEIGHT_ONLY_LIMIT)}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapter_is_added_to_every_method(
    name: str, dense: Path, tmp_path: Path, prose: str, report: list[str]
) -> None:
    preset, limit = ADAPTED[name]
    adapter = write_adapter(dense, tmp_path / "adapter")
    adapted = expected(dense, preset, prose, lambda model: adapt(model, adapter))
    plain = expected(dense, preset, prose)
    effect = divergence(plain.exact, adapted.exact)
    report.append(f"adapter over {name}: moves the reference by a mean KL of {effect:.3f}")
    assert effect > 10 * limit, f"the adapter does too little: {effect}"
    if is_rehearsal():
        pytest.skip("SGLang has no adapters on a CPU")
    flags = ("--lora-paths", f"tiny={adapter}", "--max-loras-per-batch", "2")
    with serve(dense, tmp_path / "server.log", preset, *flags) as server:
        # both over the same prefix cache, which must tell them apart
        found = adapted.nearness(adapted.served(Adapted(server, "tiny")), limit)
        base = plain.nearness(plain.served(server), limit)
        decoded = continuations(Adapted(server, "tiny"))
        undecoded = continuations(server)
        is_replayed = graphs_ran(server)
    differing = len(PROMPTS) - agreement(decoded, undecoded).num_equal
    measured = (
        f"adapter over {name}: {found}; without it {base}; "
        f"{differing} of {len(PROMPTS)} continuations differ"
    )
    report.append(measured)
    assert found.is_within, measured
    assert base.is_within, measured
    assert differing, measured
    assert is_replayed, "no graph was replayed while decoding"


_TARGET = ('match: "*.self_attn.*_proj", method: fp8', 'match: "*.mlp.*_proj", method: gptq')
_DRAFT = 'draft:\n  rules:\n    - {match: "*_proj", method: awq}\n'
DRAFTS = {"no-draft-section": "", "draft-section": _DRAFT}


@pytest.mark.parametrize("name", DRAFTS)
def test_speculation_changes_no_token(
    name: str, dense: Path, tmp_path: Path, report: list[str]
) -> None:
    preset = write_preset(tmp_path, *_TARGET, head=DRAFTS[name])
    draft = tmp_path / "draft"
    shutil.copytree(dense, draft)
    if is_rehearsal():
        pytest.skip("SGLang has no speculative decoding on a CPU")
    with serve(dense, tmp_path / "plain.log", preset) as server:
        plain = continuations(server)
    flags = (
        "--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(draft),
        "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "4",
    )  # fmt: skip
    num_correct, num_steps, gaps = 0, 0, []
    with serve(dense, tmp_path / "draft.log", preset, *flags) as server:
        for prompt, before in zip(PROMPTS, plain, strict=True):
            sampling = {
                "temperature": 0, "max_new_tokens": len(before.tokens), "ignore_eos": True
            }  # fmt: skip
            answer = server.request("/generate", {"text": prompt, "sampling_params": sampling})
            num_correct += int(answer["meta_info"]["spec_num_correct_drafts"])
            num_steps += int(answer["meta_info"]["spec_verify_ct"])
            gaps.append(gap_of(before, answer["output_ids"]))
        log = server.log_path.read_text(errors="replace")
    length = 1 + num_correct / num_steps
    measured = (
        f"speculation, {name}: acceptance length {length:.2f} of 4 at most; in {gaps.count(0.0)} "
        f"of {len(gaps)} prompts the same tokens, greatest gap of a differing one {max(gaps):.3f}"
    )
    report.append(measured)
    assert max(gaps) <= near_tie(QUANTIZED_INPUT_LIMIT), measured
    # a draft model whose weights are noise is right in no step
    assert length > 1.5, (num_correct, num_steps)
    assert ("the draft model, by the preset's section draft:" in log) == bool(DRAFTS[name])


def gap_of(before: Continuation, tokens: list[int]) -> float:
    """By the run without speculation, how far behind the first other token was; 0.0 without one."""
    assert len(tokens) == len(before.tokens), tokens
    pairs = enumerate(zip(before.tokens, tokens, strict=True))
    return next((before.gap(step, token) for step, (taken, token) in pairs if token != taken), 0.0)


def test_installed_plugin_changes_nothing_where_it_is_not_asked_for(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: list[str]
) -> None:
    if is_rehearsal():
        # naming the platform keeps the CPU engine, whatever general plugins are admitted
        monkeypatch.setenv("SGLANG_PLATFORM", "mixedprec_cpu")
    found = {}
    for admitted in ("", "no-such-plugin"):
        monkeypatch.setenv("SGLANG_PLUGINS", admitted)
        with serve(dense, tmp_path / f"server-{admitted}.log") as server:
            found[admitted] = continuations(server)
            if not admitted:
                flush(server)
                again = continuations(server)
    own, other = agreement(found[""], again), agreement(found[""], found["no-such-plugin"])
    report.append(f"stock server twice: {own}; with and without the plugin: {other}")
    # nothing of ours runs, so what is left is what one server differs by from itself
    assert other.shift <= own.shift, (str(own), str(other))
    assert other.num_equal >= own.num_equal, (str(own), str(other))


def test_composed_layers_are_compared_with_the_reference_while_they_load(
    dense: Path, tmp_path: Path, report: list[str]
) -> None:
    log_path = tmp_path / "server.log"
    with serve(dense, log_path, MIXED, "--mixedprec-verify", str(dense)) as server:
        answer = chat(server)
    log = log_path.read_text(errors="replace")
    lines = [line for line in log.splitlines() if "layers compared with" in line]
    assert len(lines) == 1, server.log_tail()
    report.append(f"{lines[0].partition('mixedprec: ')[2]}; answers {answer!r}")
    assert "Paris" in answer, answer
