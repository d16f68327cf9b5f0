"""`mixedprec plan` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def test_plan_prints_folded_groups_totals_and_exits_0(model: Path, tmp_path: Path) -> None:
    preset = write_preset(
        tmp_path, 'match: "*", method: gptq', 'match: "*.self_attn.*_proj", method: fp8_block'
    )
    code, out, err = run("plan", "--model", model, "--preset", preset)
    assert (code, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    assert rows[0] == "layers scheme method stored action before after bits"
    assert rows[2:] == [
        "model.embed_tokens - bfloat16 as stored 160.0 KiB 160.0 KiB 16.00",
        "model.layers.0-2.input_layernorm - as stored 1.5 KiB 1.5 KiB",
        "model.layers.0-2.mlp.down_proj gptq gptq 4-bit g128 "
        "bfloat16 quantize 768.0 KiB 205.5 KiB 4.28",
        "model.layers.0-2.mlp.gate_up_proj gptq gptq 4-bit g128 "
        "bfloat16 quantize 1.5 MiB 405.0 KiB 4.22",
        "model.layers.0-2.post_attention_layernorm - as stored 1.5 KiB 1.5 KiB",
        "model.layers.0-2.self_attn.qkv_proj fp8_block fp8 128x128 "
        "bfloat16 quantize 768.0 KiB 384.1 KiB 8.00",
        "model.layers.0-2.self_attn.o_proj fp8_block fp8 128x128 "
        "bfloat16 quantize 384.0 KiB 192.0 KiB 8.00",
        "model.norm - as stored 512 B 512 B",
        "lm_head - tied to model.embed_tokens as stored",
        "29 layers: 3.5 MiB stored, 1.3 MiB served, 5.49 bits a weight of linear layers, "
        "5.96 of all; unquantized 3.5 MiB, 63% saved",
    ]


def test_a_shape_that_does_not_fit_is_told_with_the_rules_that_ask_for_it(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", hidden_size=192, intermediate_size=320)
    preset = write_preset(
        tmp_path, 'match: "*.down_proj", method: gptq', 'match: "*.gate_proj", method: gptq',
        'match: "*.up_proj", method: gptq',
    )  # fmt: skip
    code, _, err = run("plan", "--model", model, "--preset", preset)
    assert code == 1
    lines = {
        line.partition(": group_size 128")[0].split(".")[-1]: line for line in err.splitlines()
    }
    assert lines["down_proj"].endswith(f"; see {preset}:3: rules[0]")
    assert lines["up_proj"].endswith(f"; see {preset}:4: rules[1], {preset}:5: rules[2]")


def test_json_has_the_documented_keys(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: awq')
    code, out, _ = run("plan", "--model", model, "--preset", preset, "--json")
    made = json.loads(out)
    assert code == 0
    layer = next(x for x in made["layers"] if x["name"] == "model.layers.1.mlp.up_proj")
    assert layer["module"] == "model.layers.1.mlp.gate_up_proj"
    assert (layer["scheme"], layer["method"], layer["source"]) == ("awq", "awq", "model")
    assert (layer["action"], layer["rule"]) == ("quantize", 0)
    assert layer["bytes"] == 512 * 256 // 2 + 2 * 512 * 2 + 2 * 512 // 2
    assert layer["bits_per_weight"] == round(8 * layer["bytes"] / (512 * 256), 4)
    assert made["totals"]["bytes"] == sum(x["bytes"] for x in made["layers"])
    assert made["problems"] == []


def test_preset_that_does_not_fit_exits_1_and_prints_every_problem(
    model: Path, tmp_path: Path
) -> None:
    preset = write_preset(
        tmp_path,
        'match: "*", method: gptq',
        'match: "*.q_proj", method: fp8',
        'match: "*.up_projj", method: fp8',
    )
    code, out, err = run("plan", "--model", model, "--preset", preset)
    assert code == 1
    assert "error: " not in out
    assert "error: model.layers.0-2.self_attn.qkv_proj: its shards need one scheme" in err
    assert f"error: {preset}:5: rules[2]: '*.up_projj' matches no layer of the model" in err


def test_broken_preset_exits_1_with_its_line_and_no_traceback(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp9')
    code, out, err = run("plan", "--model", model, "--preset", preset)
    assert (code, out) == (1, "")
    assert f"{preset}:3: rules[0].method: unknown method 'fp9'" in err
    assert "Traceback" not in err


def test_missing_model_exits_1(tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    code, _, err = run("plan", "--model", tmp_path / "none", "--preset", preset)
    assert code == 1
    assert "none: no such folder; give a local checkpoint folder" in err


@pytest.mark.parametrize(
    "argv",
    [
        ("plan",),
        ("plan", "--preset", "x"),
        ("frobnicate",),
        ("plan", "--model", "x", "--preset", "y", "--tp", "0"),
        ("plan", "--model", "x", "--preset", "y", "--device", "tpu"),
    ],
)
def test_wrong_command_line_exits_2(argv: tuple[str, ...]) -> None:
    assert run(*argv)[0] == 2


def test_dtype_that_cannot_be_mixed_exits_2(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    code, _, err = run("plan", "--model", model, "--preset", preset, "--dtype", "float32")
    assert code == 2
    assert "--dtype: 'float32' cannot hold mixed precision (expected bfloat16, float16)" in err


def test_override_reaches_the_plan(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: gptq')
    code, out, _ = run(
        "plan", "--model", model, "--preset", preset, "--json",
        "--mixedprec-set", "rules.0.group_size=32",
    )  # fmt: skip
    assert code == 0
    layer = next(x for x in json.loads(out)["layers"] if x["name"].endswith("0.mlp.up_proj"))
    assert layer["arguments"]["group_size"] == 32


def test_presets_lists_what_ships() -> None:
    code, out, _ = run("presets")
    names = [line.split()[0] for line in out.splitlines() if line and not line.startswith("in ")]
    assert code == 0
    assert "fp8-block" in names
    assert "attention-fp8-mlp-int4" in names


def test_gpu_that_does_not_run_a_method_exits_1(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*_proj", method: fp8')
    argv = ("plan", "--model", model, "--preset", preset)
    code, out, _ = run(*argv, "--gpu", "H100")
    assert code == 0
    assert "H100 of 80 GB, per rank (--tp 1):\n      0 GB  weights\n" in out
    code, _, err = run(*argv, "--gpu", "RTX 2080 Ti")
    assert code == 1
    assert "fp8 does not run on this GPU, whose compute capability is 7.5 (expected 8.0" in err
    assert run(*argv, "--gpu", "8.9")[0] == 0


def test_gpu_without_bfloat16_plans_in_float16(model: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*_proj", method: awq')
    argv = ("plan", "--model", model, "--preset", preset, "--gpu", "7.5", "--json")
    code, out, _ = run(*argv)
    assert code == 0
    assert json.loads(out)["target"] == {
        "device": "cuda", "tp_size": 1, "dtype": "F16",
        "gpu": {"name": "compute capability 7.5", "capability": 75, "memory_bytes": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--gpu", "H1000"), "--gpu: 'H1000' is not known"),
        (("--gpu", "H100", "--device", "cpu"), "--gpu: 'H100' beside --device cpu"),
    ],
)
def test_gpu_that_makes_no_sense_exits_2(
    model: Path, tmp_path: Path, argv: tuple[str, ...], message: str
) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: awq')
    code, _, err = run("plan", "--model", model, "--preset", preset, *argv)
    assert code == 2
    assert message in err


class TestDraft:
    """The plan of a draft model, by the preset's section `draft`."""

    @pytest.fixture
    def draft_model(self, tmp_path: Path) -> Path:
        return write_llama(tmp_path / "draft", num_hidden_layers=1)

    @pytest.fixture
    def preset(self, tmp_path: Path) -> Path:
        path = write_preset(tmp_path, 'match: "*", method: gptq')
        text = 'draft: {rules: [{match: "*.mlp.*", method: fp8_block}]}\n'
        path.write_text(path.read_text() + text)
        return path

    def test_draft_is_planned_beside_the_model(
        self, model: Path, preset: Path, draft_model: Path
    ) -> None:
        argv = ("plan", "--model", model, "--preset", preset, "--draft-model", draft_model)
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        _, _, below = out.partition("The draft model:")
        rows = [" ".join(line.split()[:3]) for line in below.splitlines() if line.strip()]
        assert "model.layers.0.mlp.gate_up_proj fp8_block fp8" in rows
        made = json.loads(run(*argv, "--json")[1])
        assert len(made["draft"]["layers"]) < len(made["layers"])

    def test_draft_that_is_not_named_is_told_of(self, model: Path, preset: Path) -> None:
        _, out, _ = run("plan", "--model", model, "--preset", preset)
        assert out.rstrip().endswith("The preset has a section draft; --draft-model DIR plans it.")

    def test_faults_of_the_draft_make_the_exit_code(
        self, model: Path, preset: Path, tmp_path: Path
    ) -> None:
        small = write_llama(tmp_path / "small", intermediate_size=192)
        code, _, err = run("plan", "--model", model, "--preset", preset, "--draft-model", small)
        assert code == 1
        assert "192" in err

    def test_draft_without_the_section_is_refused(
        self, model: Path, draft_model: Path, tmp_path: Path
    ) -> None:
        plain = write_preset(tmp_path / "plain", 'match: "*", method: gptq')
        argv = ("plan", "--model", model, "--preset", plain, "--draft-model", draft_model)
        code, _, err = run(*argv)
        assert code == 2
        assert "has no section draft: SGLang loads the draft model by itself; leave it out" in err
