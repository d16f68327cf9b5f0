"""Files of an engine's inputs, written here by the format's description; the real ones are in
`tests/server/test_gather.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from mixedprec_plugin.calibrate.gathered import Gathered, model_digest
from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.errors import CheckpointError
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.search import report
from mixedprec_plugin.search.candidates import find_choices
from mixedprec_plugin.search.finder import Kind
from tests.calibrate.models import write_model
from tests.search.test_search import FEW, found, planned, run

NUM_TOKENS = 640
# of module names' last components
SIZES = {"qkv_proj": 64, "o_proj": 64, "gate_up_proj": 64, "down_proj": 96}
SPLIT = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gathered") / "model"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return find_choices(open_source(model), Target("cpu")).base


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    return write(tmp_path / "inputs", plan)


def inputs_of(plan: Plan) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [name for name in plan.modules if name.endswith(tuple(SIZES))]
    assert len(names) == 12
    return {
        name: torch.randn(NUM_TOKENS, SIZES[name.rpartition(".")[2]], generator=generator)
        for name in names
    }


def write(folder: Path, plan: Plan, unseen: str = "", num_ranks: int = 2, **other: Any) -> Path:
    """Ranks' files: row-parallel layers' columns are split, the first rank has the rest."""
    folder.mkdir()
    whole = {name: x for name, x in inputs_of(plan).items() if name != unseen}
    for rank in range(num_ranks):
        tensors = {
            f"{name}.x": x.bfloat16().chunk(num_ranks, 1)[rank].contiguous()
            if name.endswith(SPLIT)
            else x.bfloat16()
            for name, x in whole.items()
            if name.endswith(SPLIT) or rank == 0
        }
        facts = {
            "version": 1, "model": model_digest(plan), "path": "there", "pp_size": 1,
            "tp_size": num_ranks, "num_tokens": NUM_TOKENS,
            "modules": [key.removesuffix(".x") for key in tensors],
            "unseen": [unseen] if unseen else [], "shares": {}, **other,
        }  # fmt: skip
        path = folder / f"inputs-tp{rank}-pp0.safetensors"
        save_file(tensors, path, {"gathered": json.dumps(facts)})
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 16])
def test_columns_of_the_ranks_are_put_together(plan: Plan, tmp_path: Path, num_ranks: int) -> None:
    gathered = Gathered(write(tmp_path / "inputs", plan, num_ranks=num_ranks), plan)
    for name, x in inputs_of(plan).items():
        assert torch.equal(gathered.tokens(name, x.shape[1]).x, x.bfloat16())
    assert int(gathered.is_held_out().sum()) == NUM_TOKENS // 5


def test_search_scores_on_them_and_says_so(model: Path, folder: Path, tmp_path: Path) -> None:
    preset = tmp_path / "found.yaml"
    words = ("--inputs", folder, "--at-load", *FEW, "--bits", 6, "--out", preset)
    first = found(model, *words)
    assert first["kind"] == "shares"
    assert first["scores_made"] > 0
    assert first["scored_on"] == f"640 tokens that an engine gathered in {folder}"
    assert f"# {'':<9} Scored on 640 tokens that an engine gathered" in preset.read_text()
    assert found(model, *words)["scores_made"] == 0
    assert planned(model, preset).check().not_calibrated() == []
    # calibrated candidates are made of them as well, and lose less
    better = found(model, "--inputs", folder, *FEW, "--bits", 6, "--out", preset)
    assert better["point"]["loss"] < first["point"]["loss"]


def test_errors_count_by_what_their_branch_adds_where_that_is_known_of_all(
    model: Path, plan: Plan, tmp_path: Path
) -> None:
    names = list(inputs_of(plan))
    made = {}
    for kind, shares in (
        ("none", {}),
        ("some", dict.fromkeys(names[1:], 0.25)),
        ("all", dict.fromkeys(names, 0.25)),
    ):
        folder = write(tmp_path / kind, plan, shares=shares)
        words = ("--inputs", folder, "--at-load", "--methods", "fp8_channel", "--bits", 9)
        made[kind] = found(model, *words, "--out", tmp_path / "found.yaml")
    assert [one["kind"] for one in made.values()] == ["shares", "shares", "parts"]
    losses = [one["point"]["loss"] for one in made.values()]
    assert losses[0] > 0
    assert losses == pytest.approx([losses[0], losses[0], losses[0] / 4])


def test_every_kind_of_score_has_its_words() -> None:
    assert report._KINDS.keys() == set(get_args(Kind))


def test_what_the_engine_did_not_see_stays_as_it_is(
    model: Path, plan: Plan, tmp_path: Path
) -> None:
    unseen = "model.layers.1.mlp.down_proj"
    folder = write(tmp_path / "inputs", plan, unseen)
    preset = tmp_path / "found.yaml"
    code, out, err = run(
        model, "--inputs", folder, "--at-load", "--bits", 6, "--methods", "awq", "--out", preset
    )
    assert code == 0, err
    assert f"left as stored: {unseen}: the engine did not see what it reads" in out
    assert planned(model, preset).by_name[unseen].is_unquantized


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_tokens": 200}, r"has 200 tokens \(expected 320 or more\); send the server more"),
        ({"model": "x"}, "was gathered from there, whose norms are others than this model's"),
        ({"version": 9}, r"is of version 9 \(expected 1\); gather them again"),
        ({"tp_size": 3}, "of 3 tensor-parallel ranks in 1 stages, and inputs-tp2-pp0.safetensors"),
        ({"tp_size": 1}, "and inputs-tp1-pp0.safetensors is of another start"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    plan: Plan, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "inputs", plan, **other)
    with pytest.raises(CheckpointError, match=message):
        Gathered(folder, plan)


def test_ranks_that_have_not_all_written_are_refused(
    plan: Plan, folder: Path, tmp_path: Path
) -> None:
    later = write(tmp_path / "later", plan, num_tokens=1280)
    shutil.copy(later / "inputs-tp1-pp0.safetensors", folder)
    with pytest.raises(CheckpointError, match="has files of 640 and 1280 tokens"):
        Gathered(folder, plan)


def test_damaged_or_missing_files_are_refused(plan: Plan, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no inputs that an engine gathered; serve the"):
        Gathered(tmp_path / "none", plan)
    (folder / "inputs-tp0-pp0.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"inputs-tp0-pp0.safetensors cannot be read \("):
        Gathered(folder, plan)


def test_modules_that_no_file_knows_are_refused(plan: Plan, folder: Path) -> None:
    gathered = Gathered(folder, plan)
    with pytest.raises(CheckpointError, match=r"knows no model\.layers\.9\.mlp\.down_proj"):
        gathered.has("model.layers.9.mlp.down_proj")
    with pytest.raises(CheckpointError, match=r"has 96 inputs of .* \(expected 64\)"):
        gathered.tokens("model.layers.0.mlp.down_proj", 64)


def test_options_of_text_do_not_go_with_them(model: Path, folder: Path, tmp_path: Path) -> None:
    words = ("--inputs", folder, "--bits", 6, "--out", tmp_path / "found.yaml")
    for option, message in (
        (("--windows", 3), "--windows: is for text, and --inputs is there in its place"),
        (("--fast",), "--inputs: is for scores, and --fast makes none"),
    ):
        code, _, err = run(model, *words, *option)
        assert code == 2
        assert re.search(message, err), err
