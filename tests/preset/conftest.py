from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mixedprec_plugin.errors import PresetError
from mixedprec_plugin.preset.load import load_preset

Write = Callable[[str, str], Path]
Refuse = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a preset into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def refuse(write: Write) -> Refuse:
    """Load a text as `p.yaml`, expect that it is refused, and return the messages."""

    def refuse_text(text: str, *overrides: str) -> list[str]:
        with pytest.raises(PresetError) as caught:
            load_preset(write("p.yaml", text), overrides)
        return [str(problem) for problem in caught.value.problems]

    return refuse_text
