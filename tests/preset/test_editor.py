"""What an editor makes of a copied preset, by the language server that editors run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run

# npm install yaml-language-server; the program, or on PATH
SERVER = os.environ.get("YAML_LANGUAGE_SERVER") or shutil.which("yaml-language-server")

pytestmark = pytest.mark.skipif(
    SERVER is None, reason="npm install -g yaml-language-server, or name it: YAML_LANGUAGE_SERVER"
)


class Editor:
    """The part of the language server protocol that is asked here."""

    def __init__(self) -> None:
        command = [str(SERVER), "--stdio"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._number = 0
        self.published: dict[str, list[dict[str, Any]]] = {}
        settings = {"processId": None, "rootUri": None, "capabilities": {
            "textDocument": {"completion": {}, "hover": {}, "publishDiagnostics": {}}}}  # fmt: skip
        self.ask("initialize", settings)
        self.tell("initialized", {})

    def tell(self, method: str, parameters: Any, **more: Any) -> None:
        body = {"jsonrpc": "2.0", "method": method, "params": parameters, **more}
        self._send(body)

    def _send(self, body: Any) -> None:
        text = json.dumps(body).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(text) + text)
        self._process.stdin.flush()

    def ask(self, method: str, parameters: Any) -> Any:
        """Ask, and read up to the answer; what the server asks itself gets nothing."""
        self._number += 1
        self.tell(method, parameters, id=self._number)
        while True:
            said = self.read()
            if said.get("id") == self._number and "method" not in said:
                return said.get("result")

    def read(self) -> dict[str, Any]:
        length = 0
        assert self._process.stdout is not None
        while line := self._process.stdout.readline().strip():
            if line.lower().startswith(b"content-length"):
                length = int(line.split(b":")[1])
        assert length, "the language server ended"
        said: dict[str, Any] = json.loads(self._process.stdout.read(length))
        if said.get("method") == "textDocument/publishDiagnostics":
            self.published[said["params"]["uri"]] = said["params"]["diagnostics"]
        elif "id" in said and "method" in said:
            items = said["params"].get("items", []) if isinstance(said.get("params"), dict) else []
            self._send({"jsonrpc": "2.0", "id": said["id"], "result": [{} for _ in items] or None})
        return said

    def open(self, path: Path, text: str) -> str:
        path.write_text(text)
        document = {"uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})
        return path.as_uri()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    found = Editor()
    yield found
    found.close()


@pytest.fixture
def first_line(tmp_path: Path) -> str:
    """The line that `presets copy` writes."""
    run("presets", "copy", "awq", tmp_path / "copied.yaml")
    return (tmp_path / "copied.yaml").read_text().splitlines()[0]


def at(uri: str, line: int, character: int) -> dict[str, Any]:
    where = {"line": line, "character": character}
    return {"textDocument": {"uri": uri}, "position": where}


def test_keys_and_methods_are_completed(editor: Editor, first_line: str, tmp_path: Path) -> None:
    text = f"{first_line}\nversion: 1\nrules:\n  - match: '*'\n    \n"
    uri = editor.open(tmp_path / "a.yaml", text)
    offered = editor.ask("textDocument/completion", at(uri, 4, 4))
    labels = {item["label"] for item in offered["items"]}
    assert {"scheme", "method", "optional", "source"} <= labels
    text = f"{first_line}\nversion: 1\nrules:\n  - match: '*'\n    method: \n"
    uri = editor.open(tmp_path / "b.yaml", text)
    offered = editor.ask("textDocument/completion", at(uri, 4, 12))
    assert {"awq", "gptq", "fp8_block"} <= {item["label"] for item in offered["items"]}


def test_keys_are_explained(editor: Editor, first_line: str, tmp_path: Path) -> None:
    text = f"{first_line}\nversion: 1\nrules:\n  - match: '*'\n    method: awq\n"
    uri = editor.open(tmp_path / "c.yaml", text)
    told = editor.ask("textDocument/hover", at(uri, 3, 6))
    assert "Globs over whole layer names" in json.dumps(told)


def test_a_typo_is_underlined_and_what_is_right_is_not(
    editor: Editor, first_line: str, tmp_path: Path
) -> None:
    good = f"{first_line}\nversion: 1\nrules:\n  - match: '*'\n    method: awq\n"
    bad = good.replace("method: awq", "method: aqw")
    for name, text, lines in (("good", good, []), ("bad", bad, [4])):
        uri = editor.open(tmp_path / f"{name}.yaml", text)
        while uri not in editor.published:
            editor.read()
        found = editor.published[uri]
        assert [one["range"]["start"]["line"] for one in found] == lines
