"""`mixedprec verify` on what other tools wrote, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.peers import FOLDERS
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.commands import run
from tests.presets import write_preset
from tests.quantize.peers import EXPECTED
from tests.verify.slices import DATA, Change, verify, write_slices

K_PROJ = "model.layers.0.self_attn.k_proj"
V_PROJ = "model.layers.0.self_attn.v_proj"


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_slices(tmp_path / "reference", "peers", "bf16")


@pytest.mark.parametrize("tool", FOLDERS)
def test_what_other_tools_wrote_is_near_its_original(
    reference: Path, tmp_path: Path, tool: str
) -> None:
    code, found = verify(write_slices(tmp_path / "model", "peers", tool), reference)
    assert code == 0
    assert not any(entry["too_far"] for entry in found.values())
    if tool not in ("bf16", "autoawq-g64"):  # the latter's is folded
        expected = EXPECTED[tool][f"{K_PROJ}.weight"]["relative_rms_to_bf16"]
        assert found[K_PROJ]["relative_error"] == pytest.approx(expected, abs=3e-4)


def swap_nibbles(words: torch.Tensor) -> torch.Tensor:
    octets = words.contiguous().view(torch.uint8)
    return ((octets >> 4) | (octets << 4)).view(torch.int32)


def swap_bytes(words: torch.Tensor) -> torch.Tensor:
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return octets.flip(-1).contiguous().view(torch.int32).squeeze(-1)


def in_order(words: torch.Tensor) -> torch.Tensor:
    """AWQ's words as if their nibbles were not interleaved."""
    shifts = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
    nibbles = [(words >> int(shift)) & 15 for shift in shifts]
    return sum((n << (4 * i) for i, n in enumerate(nibbles)), torch.zeros_like(words))


def one_more(words: torch.Tensor) -> torch.Tensor:
    """Zero points as the other GPTQ version stores them; no nibble is 15 here, or it stays."""
    octets = words.contiguous().view(torch.uint8)
    low, high = (octets & 15), (octets >> 4)
    return ((low + 1).clamp(max=15) | ((high + 1).clamp(max=15) << 4)).view(torch.int32)


def some_more(zeros: torch.Tensor) -> torch.Tensor:
    """Of every other group: those of all would tell that they are stored one higher."""
    changed = zeros.clone()
    changed[::2] += 0x33333333
    return changed


def transpose_grid(scales: torch.Tensor) -> torch.Tensor:
    return scales.t().contiguous().reshape(scales.shape)


DAMAGES: list[tuple[str, str, Change]] = [
    ("autoround-gptq-g64", "k_proj.qweight", swap_nibbles),
    ("autoround-gptq-g64", "k_proj.qweight", swap_bytes),
    ("autoround-gptq-g64", "k_proj.scales", transpose_grid),
    ("autoround-gptq-g64", "k_proj.scales", lambda scales: scales.flip(0)),
    ("autoround-gptq-g64", "k_proj.scales", lambda scales: -scales),
    ("autoround-gptq-g64", "k_proj.g_idx", lambda g_idx: g_idx.flip(0)),
    ("gptqmodel-asym-g64", "k_proj.qzeros", some_more),
    ("gptqmodel-gptq-g64", "k_proj.scales", transpose_grid),
    ("autoawq-g64", "k_proj.qweight", in_order),
    ("autoawq-g64", "k_proj.qzeros", one_more),
    ("autoawq-g64", "k_proj.scales", transpose_grid),
    ("autoawq-g64", "input_layernorm.weight", lambda norm: norm.roll(1)),
    ("autoround-awq-asym-g64", "k_proj.qzeros", in_order),
    ("llmcompressor-w4a16-g64", "k_proj.weight_packed", swap_nibbles),
    ("llmcompressor-w4a16-g64", "k_proj.weight_scale", transpose_grid),
    ("llmcompressor-w4a16-asym-g64", "k_proj.weight_zero_point", one_more),
    ("llmcompressor-w4a16-asym-g64", "k_proj.weight_zero_point", swap_bytes),
    ("llmcompressor-fp8-block", "k_proj.weight_scale", transpose_grid),
    ("llmcompressor-fp8-block", "k_proj.weight_scale", torch.reciprocal),
    ("llmcompressor-fp8-dynamic", "k_proj.weight_scale", lambda scales: scales.flip(0)),
    ("gptqmodel-fp8-row", "k_proj.weight_scale_inv", torch.reciprocal),
    ("llmcompressor-w8a8-int8", "k_proj.weight", lambda codes: codes.roll(1, 0)),
    ("autoround-int8", "k_proj.weight_scale", lambda scales: scales * 1.1),
]


@pytest.mark.parametrize(
    ("tool", "end", "change"), DAMAGES, ids=[f"{t}-{e}-{n}" for n, (t, e, _) in enumerate(DAMAGES)]
)
def test_checkpoint_that_loads_cleanly_and_emits_garbage_is_found(
    reference: Path, tmp_path: Path, tool: str, end: str, change: Change
) -> None:
    model = write_slices(tmp_path / "model", "peers", tool, {end: change})
    code, found = verify(model, reference)
    assert code == 1
    damaged = [name for name, entry in found.items() if entry["too_far"]]
    assert K_PROJ in damaged
    assert (f"{K_PROJ[:-6]}v_proj" in damaged) == end.startswith("input_layernorm")
    assert next(iter(found)) in damaged  # the worst come first


class TestFolded:
    """AutoAWQ's MLP: folded into the norm, and from down_proj into up_proj."""

    MLP = "model.layers.0.mlp"

    @pytest.fixture
    def reference(self, tmp_path: Path) -> Path:
        return write_slices(tmp_path / "reference", "folded", "bf16")

    def test_whole_unit_is_near_its_original(self, reference: Path, tmp_path: Path) -> None:
        code, found = verify(write_slices(tmp_path / "model", "folded", "autoawq-g64"), reference)
        assert code == 0
        assert found[f"{self.MLP}.gate_proj"]["note"] == "with its norm"
        assert found[f"{self.MLP}.down_proj"]["note"] == f"with {self.MLP}.up_proj"
        assert found[f"{self.MLP}.up_proj"]["note"] == f"with {self.MLP}.down_proj"
        norm = found["model.layers.0.post_attention_layernorm.weight"]
        assert norm["note"] == "folded: judged with the layers behind it"
        assert norm["relative_error"] > 0.1

    @pytest.mark.parametrize("last", ["down_proj", "up_proj", "post_attention_layernorm"])
    def test_part_of_a_unit_beside_the_original_is_too_far(
        self, reference: Path, tmp_path: Path, last: str
    ) -> None:
        model = write_slices(tmp_path / "model", "folded", "autoawq-g64")
        original = load_file(DATA / "folded" / "bf16" / "layer0.safetensors")
        tensors = {n: t for n, t in load_file(model / "model.safetensors").items() if last not in n}
        tensors |= {name: tensor for name, tensor in original.items() if last in name}
        save_file(tensors, model / "model.safetensors")
        code, found = verify(model, reference)
        assert code == 1
        assert any(entry["too_far"] for entry in found.values())

    @pytest.mark.parametrize(
        ("end", "change"),
        [
            ("down_proj.qweight", in_order),
            ("up_proj.qweight", in_order),
            ("up_proj.qzeros", one_more),
            ("down_proj.scales", lambda scales: scales.flip(1)),
            ("post_attention_layernorm.weight", lambda norm: norm.flip(0)),
        ],
    )
    def test_damage_is_not_taken_for_a_fold(
        self, reference: Path, tmp_path: Path, end: str, change: Change
    ) -> None:
        model = write_slices(tmp_path / "model", "folded", "autoawq-g64", {end: change})
        assert verify(model, reference)[0] == 1


@pytest.mark.parametrize(
    ("larger", "smaller", "rounded"),
    [
        ("self_attn.v_proj", "", "*.o_proj"),
        ("mlp.up_proj", "", "*.down_proj"),
        ("input_layernorm", "", "*.{q,k,v}_proj"),
        # of gate and up, up alone makes up for it
        ("post_attention_layernorm", "mlp.up_proj", "*.{gate,up}_proj"),
    ],
)
@pytest.mark.parametrize("factor", [1.04, 1.2])
def test_a_factor_is_not_excused_by_coarse_codes_behind_it(
    tmp_path: Path, larger: str, smaller: str, rounded: str, factor: float
) -> None:
    config = llama_config(num_hidden_layers=1)
    tensors = llama_tensors(config)
    reference = write_checkpoint(tmp_path / "reference", config, tensors)
    for layer, times in ((larger, factor), (smaller, 1 / factor)):
        if layer:
            name = f"model.layers.0.{layer}.weight"
            tensors[name] = (tensors[name].float() * times).bfloat16()
    model = write_checkpoint(tmp_path / "model", config, tensors)
    preset = write_preset(tmp_path, f'match: "{rounded}", method: gptq, group_size: -1')
    flags = ("--preset", preset, "--reference", reference)
    assert run("verify", "--model", reference, *flags)[0] == 0
    assert run("verify", "--model", model, *flags)[0] == 1


def test_threshold_of_a_method_can_be_chosen(reference: Path, tmp_path: Path) -> None:
    model = write_slices(tmp_path / "model", "peers", "gptqmodel-gptq-g64")
    assert verify(model, reference, "--threshold", "gptq=0.01")[0] == 1
    model = write_slices(tmp_path / "wrong", "peers", "gptqmodel-gptq-g64",
                         {"k_proj.scales": transpose_grid})  # fmt: skip
    assert verify(model, reference, "--threshold", "gptq=3")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gptq",
            "--threshold: 'gptq' is not a threshold (expected METHOD=VALUE, such as gptq=0.3)",
        ),
        (
            "gptq=1e999",
            "--threshold: 'gptq=1e999' is not a threshold (expected METHOD=VALUE, such as",
        ),
        ("gptq=-1", "--threshold: 'gptq=-1' is not a threshold"),
        ("gptq=nan", "--threshold: 'gptq=nan' is not a threshold"),
        ("gptk=1", "--threshold: unknown method 'gptk' (expected bf16, "),
    ],
)
def test_threshold_that_is_none_is_a_usage_error(
    reference: Path, tmp_path: Path, text: str, message: str
) -> None:
    preset = write_preset(tmp_path / "presets", 'match: "*", method: bf16')
    flags = ("--model", reference, "--preset", preset, "--reference", reference)
    code, _, err = run("verify", *flags, "--threshold", text)
    assert code == 2
    assert message in err


def test_layer_that_the_reference_lacks_is_told(reference: Path, tmp_path: Path) -> None:
    model = write_slices(tmp_path / "model", "peers", "bf16")
    tensors = load_file(reference / "model.safetensors")
    del tensors[f"{K_PROJ}.weight"]
    save_file(tensors, reference / "model.safetensors")
    code, found = verify(model, reference)
    assert code == 1
    assert found[K_PROJ]["note"] == "not in the reference"


def test_table_shows_the_worst_layers_first(reference: Path, tmp_path: Path) -> None:
    model = write_slices(tmp_path / "model", "peers", "autoround-gptq-g64",
                         {"v_proj.qweight": swap_nibbles})  # fmt: skip
    preset = write_preset(tmp_path / "presets", 'match: "*", method: bf16')
    flags = ("--model", model, "--preset", preset, "--reference", reference)
    code, out, err = run("verify", *flags)
    assert code == 1
    lines = [line for line in out.splitlines() if "model.layers" in line]
    assert "v_proj" in lines[0]
    assert out.splitlines()[-1] == "3 compared: 1 too far"
    (line,) = err.splitlines()
    assert line.startswith(
        f"mixedprec: error: {V_PROJ}: is not what bf16 makes of the reference; it is damage"
    )


def test_what_is_well_is_said_with_what_that_means(reference: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "presets", 'match: "*", method: awq, group_size: 32')
    flags = ("--model", reference, "--preset", preset, "--reference", reference)
    code, out, err = run("verify", *flags)
    assert (code, err) == (0, "")
    assert "\n3 compared: 0 too far\nEvery layer is what its method makes of the reference" in out
    assert out.endswith("What the rounding costs in predictions, mixedprec eval measures.\n")


def test_a_layer_that_its_scheme_rounds_badly_is_warned_of(reference: Path, tmp_path: Path) -> None:
    """A few weights of a block are a hundred times the rest, which get one code or two."""
    tensors = load_file(reference / "model.safetensors")
    weight = tensors[f"{K_PROJ}.weight"]
    weight[::8, ::64] = 100 * weight.abs().max()
    save_file(tensors, reference / "model.safetensors")
    preset = write_preset(
        tmp_path / "presets", 'match: "*", method: blockwise_int8, weight_block_size: [64, 64]'
    )
    flags = ("--model", reference, "--preset", preset, "--reference", reference)
    code, _, err = run("verify", *flags, "--threshold", "blockwise_int8=0.9")
    assert code == 0
    (line,) = err.splitlines()
    told = f"mixedprec: warning: {K_PROJ}: blockwise_int8 rounds it badly: an error of 0.9%"
    assert line.startswith(told)
