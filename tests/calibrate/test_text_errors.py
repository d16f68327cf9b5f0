"""What is wrong with a tokenizer or a text is one error, which names a remedy that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.checkpoints import write_llama
from tests.commands import run

PRESET = 'version: 1\nrules: [{match: "*_proj", method: awq, group_size: 64}]\n'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random Llama with a tokenizer of bytes."""
    folder = write_llama(tmp_path / "model", num_hidden_layers=1, hidden_size=128,
                         intermediate_size=128, num_attention_heads=2, head_dim=64)  # fmt: skip
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "preset.yaml").write_text(PRESET)
    (tmp_path / "text.txt").write_text("Some plain text. " * 40)
    return folder


def command(verb: str, model: Path, text: Path) -> tuple[int, str, str]:
    preset, out = model.parent / "preset.yaml", model.parent / "out"
    options: dict[str, list[object]] = {
        "eval": ["--preset", preset],
        "convert": ["--preset", preset, "--out", out, "--calibrate"],
        "search": ["--out", out, "--bits", "5"],
    }
    sizes = ["--length", "16", "--windows", "4"]
    return run(verb, "--model", model, *options[verb], "--text", text, *sizes, "--device", "cpu")


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


def without_vocabulary(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def cut_short(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])


def not_json(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize("verb", ["eval", "convert", "search"])
@pytest.mark.parametrize("damage", [without_tokenizer, without_vocabulary, cut_short, not_json])
def test_a_tokenizer_that_is_not_there(
    model: Path, verb: str, damage: Callable[[Path], None]
) -> None:
    own = shutil.copytree(model, model.parent / "own")
    damage(model)
    code, _, err = command(verb, model, model.parent / "text.txt")
    line = err.splitlines()[-1]
    assert code == 1
    assert "Traceback" not in err
    assert line.startswith(f"mixedprec: error: {model}: its tokenizer ")
    assert line.endswith(
        "copy tokenizer.json and tokenizer_config.json of the model's release into the folder"
    )
    if verb == "eval":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(own / name, model / name)
        code, _, err = command(verb, model, model.parent / "text.txt")
        assert code == 0, err


@pytest.mark.parametrize("verb", ["eval", "convert", "search"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "cannot be read: it is not UTF-8"),
        (b"Too short.", "is 10 tokens (expected 16 or more)"),
    ],
)
def test_a_text_that_is_none(model: Path, verb: str, text: bytes, what: str) -> None:
    path = model.parent / "other.txt"
    path.write_bytes(text)
    code, _, err = command(verb, model, path)
    line = err.splitlines()[-1]
    assert code == 2
    assert line.startswith(f"mixedprec: error: --text: {path} {what}; name a ")


@pytest.mark.parametrize("verb", ["eval", "convert", "search"])
def test_a_text_that_is_not_there(model: Path, verb: str) -> None:
    path = model.parent / "other.txt"
    said = f"--text: there is no file {path}; see mixedprec {verb} --help"
    assert command(verb, model, path) == (2, "", f"mixedprec: error: {said}\n")


def test_a_window_of_nothing_but_the_beginning(model: Path) -> None:
    path = model / "tokenizer.json"
    said = json.loads(path.read_text())
    said["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "!", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
    }  # fmt: skip
    path.write_text(json.dumps(said))
    code, _, err = run(
        "eval", "--model", model, "--preset", model.parent / "preset.yaml", "--length", 1,
        "--text", model.parent / "text.txt", "--device", "cpu",
    )  # fmt: skip
    assert code == 2
    assert "--length: " in err.splitlines()[-1]
