from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixedprec_plugin.checkpoint.source import INDEX_NAME, open_source
from mixedprec_plugin.errors import CheckpointError
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama


def test_one_file_and_many_parts_give_the_same_layers(tmp_path: Path) -> None:
    one, many = write_llama(tmp_path / "one"), write_llama(tmp_path / "many", parts=4)
    first, second = open_source(one), open_source(many)
    assert set(first.tensors) == set(second.tensors) == set(llama_tensors(llama_config()))
    assert set(first.layers) == set(second.layers)
    assert set(second.layers["model.layers.2.mlp.up_proj"]) == {"weight"}


def test_index_decides_over_a_stale_copy(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, parts=2)
    save_file({"model.norm.weight": torch.zeros(7)}, folder / "stale.safetensors")
    assert open_source(folder).tensors["model.norm.weight"].shape == (256,)


def test_tensor_in_two_files_without_an_index_raises(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, parts=2)
    (folder / INDEX_NAME).unlink()
    save_file({"model.norm.weight": torch.zeros(256)}, folder / "model-0.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' is also in model-0\.safetensors"
    ):
        open_source(folder)


def test_missing_part_and_lacking_tensor_are_reported_together(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, parts=3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 2
    assert "model-00001-of-00003.safetensors: cannot be read" in texts[0]
    assert "lacks 'model.ghost.weight', which model.safetensors.index.json promises" in texts[1]


def test_line_of_an_index_that_no_file_bears_out_can_be_taken_out(tmp_path: Path) -> None:
    # as old Llamas' rotary_emb.inv_freq, where the tensors were written anew
    folder = write_llama(tmp_path, parts=3)
    index = json.loads((folder / INDEX_NAME).read_text())
    whole = open_source(folder).tensors.keys()
    index["weight_map"]["model.ghost.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="download both again, or take it out of the index"):
        open_source(folder)
    del index["weight_map"]["model.ghost.weight"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert open_source(folder).tensors.keys() == whole


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b"])
def test_index_that_leaves_the_folder_raises(tmp_path: Path, name: str) -> None:
    folder = write_llama(tmp_path)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is outside the folder"):
        open_source(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json: is not there; download it"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: is not a JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no safetensors file"),
        (lambda f: (f / INDEX_NAME).write_text("{}"), "has no weight_map"),
    ],
)
def test_damaged_folder_raises(tmp_path: Path, damage: object, message: str) -> None:
    folder = write_llama(tmp_path)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        open_source(folder)


def test_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        open_source(tmp_path / "nowhere")


def test_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "elsewhere")
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tmp_path / "elsewhere" / "config.json", folder)
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link out of its folder, to .*copy the file"):
        open_source(folder)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"text_config": {"quantization_config": {"bits": 1}}}, 1),
        ({"llm_config": {"quantization_config": {"bits": 1}}}, 1),
        ({"language_config": {"quantization_config": {"bits": 1}}}, 1),
        ({"compression_config": {"bits": 1}}, 1),
        # the order of SGLang's `_select_hf_quant_metadata`
        ({"text_config": {"quantization_config": {"bits": 1}},
          "quantization_config": {"bits": 2}, "compression_config": {"bits": 3}}, 2),
        ({"text_config": {"quantization_config": {"bits": 1}},
          "compression_config": {"bits": 3}}, 1),
        ({"text_config": {"quantization_config": {"bits": 1}}, "quantization_config": {}}, 1),
        ({"vision_config": {"quantization_config": {"bits": 1}}}, None),
        ({"text_config": None}, None),
    ],
)  # fmt: skip
def test_quantization_config_is_found_where_writers_put_it(
    tmp_path: Path, config: dict[str, Any], found: int | None
) -> None:
    folder = write_checkpoint(tmp_path, config, {"x.weight": torch.zeros(2, 2)})
    assert open_source(folder).quantization_config.get("bits") == found
