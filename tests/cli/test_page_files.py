"""What `mixedprec plan --html` and `--svg` write, without a browser."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mixedprec_plugin.resources import page_path
from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


class _Scripts(HTMLParser):
    """The elements of a page, and what its data element holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data = ""
        self._is_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._is_data = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        self.data += data if self._is_data else ""

    def handle_endtag(self, tag: str) -> None:
        self._is_data = False


def test_nothing_in_a_preset_ends_the_pages_data(llama: Path, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)><!--<script>/*DATA*/ $& \u2028"
    head = f"description: {json.dumps(evil)}\n"
    preset = write_preset(tmp_path, 'match: "*", method: fp8', head=head)
    html = tmp_path / "plan.html"
    assert run("plan", "--model", llama, "--preset", preset, "--html", html)[0] == 0
    found = _Scripts()
    found.feed(html.read_text(encoding="utf-8"))
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert json.loads(found.data)["plan"]["preset"]["description"] == evil


def test_page_is_built_of_the_sources_that_are_there() -> None:
    folder = page_path("src").parent
    sources = [f"src/{path.name}" for path in (folder / "src").iterdir()]
    digest = hashlib.sha256()
    for name in sorted([*sources, "build.mjs", "package-lock.json", "scale.json"]):
        digest.update((folder / name).read_bytes())
    text = page_path().read_text(encoding="utf-8")
    assert digest.hexdigest() in text, "run npm ci && npm run build in mixedprec_plugin/page"


def test_svg_has_areas_in_proportion_to_bytes(llama: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path, 'match: "*.mlp.*", method: awq')
    svg = tmp_path / "map.svg"
    code, out, _ = run("plan", "--model", llama, "--preset", preset, "--svg", svg, "--json")
    assert code == 0
    sizes: dict[str, int] = {}
    for layer in json.loads(out)["layers"]:
        kind = re.sub(r"^model\.layers\.\d+\.", "", layer["module"])
        sizes[kind] = sizes.get(kind, 0) + layer["bytes"]
    names = {"svg": "http://www.w3.org/2000/svg"}
    tiles = ElementTree.parse(svg).getroot().findall("svg:g", names)
    assert len(tiles) == len(sizes)
    for tile in tiles:
        kind = tile.findtext("svg:title", "", names).partition(",")[0]
        shape = tile.find("svg:rect", names)
        assert shape is not None
        # each tile leaves a pixel to the next one
        area = (float(shape.get("width", 0)) + 1) * (float(shape.get("height", 0)) + 1)
        share = sizes[kind] / sum(sizes.values())
        assert area == pytest.approx(share * 1000 * 520, rel=0.1, abs=60)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--against", "fp8"],
            r"--against: is for the page only; add --html",
        ),
        (["--html", "/proc/none/plan.html"], r"--html: /proc/none/plan\.html cannot be written"),
    ],
)
def test_page_that_cannot_be_written_is_an_error(
    llama: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    preset = write_preset(tmp_path, 'match: "*", method: fp8')
    code, _, err = run("plan", "--model", llama, "--preset", preset, *flags)
    assert code == 2
    assert re.search(message, err)
