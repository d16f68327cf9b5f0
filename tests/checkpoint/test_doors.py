"""What anybody's checkpoint says of itself: of the right kind, or an error, and soon."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixedprec_plugin.checkpoint.records import check_record
from mixedprec_plugin.checkpoint.source import INDEX_NAME, Source, open_source
from mixedprec_plugin.cli.inspect import inspect_layers
from mixedprec_plugin.errors import CheckpointError
from tests.checkpoints import llama_config, write_llama
from tests.headers import write_headers


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("put", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "model-00001-of-00002.safetensors"])
def test_what_is_no_plain_file_is_refused_at_once(
    tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    folder = write_llama(tmp_path, parts=2)
    (folder / name).unlink()
    put(folder / name)
    with within(5), pytest.raises(CheckpointError, match=rf"{name}: "):
        open_source(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 100_000, "is not JSON"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", "nested more than 32 deep"),
        ('{"a": [' + "[]," * 2_000_000 + "0]}", "larger than any record"),
        (" " * (65 << 20), "larger than any record"),
        ('{"model_type": "\\ud800"}', "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_json_beyond_all_bounds_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    folder = write_llama(tmp_path)
    (folder / "config.json").write_text(text)
    with within(20), pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_source(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_mark_is_refused_and_the_remedy_works(tmp_path: Path, encoding: str) -> None:
    path = write_llama(tmp_path) / "config.json"
    text = path.read_text()
    path.write_text(text, encoding=encoding)
    with pytest.raises(CheckpointError, match="save it as UTF-8 without one"):
        open_source(tmp_path)
    path.write_text(text, encoding="utf-8")
    assert open_source(tmp_path).config["model_type"] == "llama"


def fp8(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", **weights}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def converted(*layers: Any) -> dict[str, Any]:
    return {"quant_method": "mixedprec", "layers": list(layers)}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"head_dim": "64"}, r"head_dim: '64' \(expected a whole number or null"),
        ({"head_dim": -64}, r"head_dim: -64 \(expected minimum 0"),
        ({"hidden_size": [256]}, "hidden_size"),
        ({"hidden_size": 256.0}, "hidden_size"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": {}}, "num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: nan \(expected a number"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, r"rope_parameters\.rope_theta"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [None]}, r"architectures\[0\]"),
        ({"text_config": ["a"]}, "text_config"),
        ({"text_config": {"vocab_size": "320"}}, r"text_config\.vocab_size"),
        ({"text_config": {"quantization_config": 4}}, r"text_config\.quantization_config"),
        ({"quantization_config": "awq"}, "quantization_config"),
        ({"compression_config": {"ignore": [1]}}, r"compression_config\.ignore\[0\]"),
        ({"quantization_config": {"quant_method": 1}}, r"quantization_config\.quant_method"),
        ({"quantization_config": {"bits": "4"}}, r"quantization_config\.bits"),
        ({"quantization_config": {"transform_config": ["R1"]}}, r"transform_config: \['R1'\]"),
        ({"quantization_config": {"group_size": -2}}, r"quantization_config\.group_size"),
        ({"quantization_config": {"dynamic": {"+:a.b": 4}}}, r"dynamic\['\+:a\.b'\]"),
        ({"quantization_config": {"extra_config": {"a": {"bits": []}}}}, r"extra_config\.a\.bits"),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, r"weight_block_size\[1\]"),
        ({"quantization_config": fp8(num_bits=0)}, r"group_0\.weights\.num_bits"),
        ({"quantization_config": fp8(symmetric="yes")}, r"group_0\.weights\.symmetric"),
        ({"quantization_config": converted(7)}, r"layers\[0\]"),
        ({"quantization_config": converted({"x": 1})}, r"layers\[0\]: .*the keys config and names"),
        ({"quantization_config": converted({"config": {}, "names": "a"})}, r"layers\[0\]\.names"),
        ({"quantization_config": converted({"config": 1, "names": []})}, r"layers\[0\]\.config"),
    ],
)
def test_value_of_the_wrong_kind_is_refused_by_its_key(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    folder = write_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps(llama_config(**changes)))
    with pytest.raises(CheckpointError, match=rf"config\.json: (\w+\.)*{key}"):
        open_source(folder)


@pytest.mark.parametrize("name", ["a.0-9999999999", "a.0-99999", "a." + "0-99," * 900 + "1"])
def test_names_of_more_layers_than_there_are_tensors_are_not_unfolded(
    tmp_path: Path, name: str
) -> None:
    said = converted({"config": {}, "names": [name]})
    source = open_source(write_llama(tmp_path, quantization_config=said))
    message = r"config\.json: quantization_config\.layers: .*names more layers than"
    with within(5), pytest.raises(CheckpointError, match=message):
        source.quantization_config_of("a.0")


CONFIGS = """
import json, warnings
warnings.simplefilter("ignore")
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VL
from transformers.utils import quantization_config as quantizers
for name in sorted({*TEXT, *VL} - {"musicgen", "musicgen_melody", "vision-encoder-decoder"}):
    print(CONFIG_MAPPING[name]().to_json_string(use_diff=False).replace("\\n", " "))
Q = quantizers
for said in (Q.AutoRoundConfig(), Q.GPTQConfig(4), Q.AwqConfig(4), Q.FineGrainedFP8Config(),
             Q.CompressedTensorsConfig(), Q.FbgemmFp8Config(), Q.BitsAndBytesConfig(),
             Q.Mxfp4Config(), Q.BitNetQuantConfig(), Q.EetqConfig(), Q.QuantoConfig()):
    print(json.dumps({"quantization_config": said.to_dict()}, default=str))
"""


@pytest.mark.slow
def test_what_transformers_writes_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFIGS],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    configs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(configs) > 200
    for config in configs:
        check_record(config, Path(config.get("model_type", "quantization_config")))


@pytest.mark.parametrize(
    "config",
    [
        # as their authors' own tools write them: lists by layer, infinity, exl2's bits, no values
        {"intermediate_size": [16384, 8192], "rope_theta": [1e6, 1e4], "num_experts": [64, 64]},
        {"time_step_limit": [0.0, float("inf")], "architectures": None, "text_config": None},
        {"quantization_config": {"quant_method": "exl2", "bits": 4.65, "version": "0.1.1"}},
        {"quantization_config": fp8(actorder=None, group_size=None, dynamic="local")},
        {"quantization_config": None, "num_hidden_layers": 0, "head_dim": None},
    ],
)
def test_what_other_writers_mean_passes(config: dict[str, Any]) -> None:
    check_record(config, Path("config.json"))


def test_patterns_without_number_are_refused(tmp_path: Path) -> None:
    said = {"quant_method": "compressed-tensors", "ignore": [f"re:(a+)+{i}" for i in range(3000)]}
    folder = write_llama(tmp_path, quantization_config=said)
    with pytest.raises(CheckpointError, match=r"quantization_config: holds 3,000 patterns"):
        open_source(folder)


def test_lists_of_layers_are_looked_up_and_not_gone_through(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.mlp" for number in range(2, 150_000)]
    said = {"quant_method": "fp8", "ignored_layers": [*names, "model.layers.0.self_attn"]}
    with within(60):
        source = open_source(write_llama(tmp_path, quantization_config=said))
        layers = {layer.name: layer.stored for layer in inspect_layers(source)}
    stored = layers["model.layers.0.mlp.up_proj"]
    assert stored is not None
    assert "config.json says fp8" in stored.disagreements[0]
    stored = layers["model.layers.0.self_attn.q_proj"]
    assert stored is not None
    assert stored.disagreements == ()


def test_stale_index_is_named_and_the_remedy_works(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, parts=2)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00003.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    message = "'model-00001-of-00003.safetensors'.*'model-00001-of-00002.*; remove the stale index"
    with pytest.raises(CheckpointError, match=rf"{INDEX_NAME}: .*{message}"):
        open_source(folder)
    (folder / INDEX_NAME).unlink()
    assert "model.norm.weight" in open_source(folder).tensors


@pytest.mark.parametrize("value", [1, None, ["a"], {}])
def test_index_that_names_no_file_raises(tmp_path: Path, value: Any) -> None:
    folder = write_llama(tmp_path)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    with pytest.raises(CheckpointError, match=r"weight_map\['model\.norm\.weight'\] is .*file's"):
        open_source(folder)


def linked(tmp_path: Path, elsewhere: Path) -> Path:
    """A folder of links to the files of a checkpoint, which are moved elsewhere."""
    folder = write_llama(tmp_path / "model")
    elsewhere.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, elsewhere / str(number))
        path.symlink_to(elsewhere / str(number))
    return folder


def test_folder_of_links_into_the_hubs_cache_is_read(tmp_path: Path) -> None:
    folder = linked(tmp_path, tmp_path / "hub" / "models--a--b" / "blobs")
    assert open_source(folder).tensors.keys() == load_file(folder / "model.safetensors").keys()


def test_other_links_are_refused_until_the_remedy_is_followed(tmp_path: Path) -> None:
    folder = linked(tmp_path, tmp_path / "private")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match="is a link out of its folder") as caught:
            open_source(folder)
        (problem,) = caught.value.problems
        assert problem.where == str(folder / name)
        subprocess.run(shlex.split(problem.remedy.removeprefix("copy the file: ")), check=True)
    assert open_source(folder).layers


def test_hidden_files_of_other_systems_are_no_weights(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit.safetensors")
    (folder / "._gptq_model-4bit.safetensors").write_bytes(b"Mac OS X")
    assert open_source(folder).layers


def test_names_and_shapes_that_no_tensor_has_are_refused(tmp_path: Path) -> None:
    for name in ("a\x1b[31m.weight", "a" * 2000):
        save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="expected 1024 printable characters"):
            open_source(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}).encode()
    size = len(header).to_bytes(8, "little")
    (tmp_path / "model.safetensors").write_bytes(size + header + data[-4:])
    with pytest.raises(CheckpointError, match="expected up to 64 lengths"):
        open_source(tmp_path)


def fused_experts(folder: Path, num_experts: int, width: int) -> Source:
    fused = "model.layers.0.mlp.experts."
    tensors = {
        f"{fused}gate_up_proj": ("BF16", (num_experts, 2 * width, 1)),
        f"{fused}down_proj": ("BF16", (num_experts, 1, width)),
    }
    return open_source(write_headers(folder, {"hidden_size": 1}, tensors))


def test_fused_experts_without_end_are_not_taken_apart(tmp_path: Path) -> None:
    with within(5):
        assert list(fused_experts(tmp_path, 1 << 40, 0).layers) == ["model.layers.0.mlp.experts"]
        with pytest.raises(CheckpointError, match="hold 1,048,576 experts and more"):
            assert fused_experts(tmp_path, 1 << 20, 1).layers
