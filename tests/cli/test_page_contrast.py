"""Whether every text of the page can be read, in light and in dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser import Browser, needs_browser
from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset

# every text of the page and of its pictures: itself, its colour, and what is behind it, in 0 to 255
TEXTS = """(() => {
    const solid = (e) => {
        const found = getComputedStyle(e).backgroundColor;
        return found === "rgba(0, 0, 0, 0)" && e.parentElement ? solid(e.parentElement) : found;
    };
    const numbers = (color) => color.match(/\\d+/g).slice(0, 3).map(Number);
    const made = [...window.drawn], filter = document.querySelector("#filter");
    const hint = getComputedStyle(filter, "::placeholder").color;
    made.push([filter.placeholder, numbers(hint), numbers(solid(filter))]);
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || !e.checkVisibility() || e.matches("script, style, option")) continue;
        made.push([text, numbers(getComputedStyle(e).color), numbers(solid(e))]);
    }
    return made;
})()"""
# what pictures write, seen before it is written
WATCH = """
    window.drawn = [];
    const original = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
        const at = this.getTransform().transformPoint(new DOMPoint(x, y));
        let behind = [...this.getImageData(at.x + 2, at.y + 2, 1, 1).data];
        if (!behind[3]) {
            const page = getComputedStyle(document.documentElement).backgroundColor;
            behind = page.match(/\\d+/g).map(Number);
        }
        const alpha = this.globalAlpha, ink = [1, 3, 5].map((at, k) =>
            parseInt(this.fillStyle.slice(at, at + 2), 16) * alpha + behind[k] * (1 - alpha));
        window.drawn.push([text, ink, behind.slice(0, 3)]);
        original.apply(this, arguments);
    };
"""


def _contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(color: list[float]) -> float:
        linear = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (x / 255 for x in color)
        )  # fmt: skip
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(tmp_path: Path, dark: bool) -> None:
    llama = write_llama(tmp_path / "model")
    rules = ['match: "*", method: fp8', 'match: "*.q_proj", method: int8_channel']
    rules += [
        'match: "*.{gate,up}_proj", method: awq, group_size: 32',
        'match: "*.absent", method: awq',
    ]
    preset = write_preset(tmp_path / "one", *rules)
    other = write_preset(tmp_path / "two", 'match: "*.mlp.*", method: awq')
    errors = tmp_path / "verify.json"
    records = [
        {"layer": f"model.layers.{block}.mlp.{name}_proj", "relative_error": 0.01 * 3**at}
        for at, (block, name) in enumerate((b, n) for b in range(3) for n in ("up", "down"))
    ]
    errors.write_text(json.dumps({"layers": records}))
    html = tmp_path / "plan.html"
    run("plan", "--model", llama, "--preset", preset, "--html", html, "--gpu", "T4",
        "--against", other, "--overlay", errors)  # fmt: skip
    # of its own: it notes that pictures are read so often
    with Browser(tmp_path / "profile") as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        browser.look(1440, 1000, dark=dark)
        browser.open(html)
        browser.run("document.querySelectorAll('.rules button')[1].click()")
        for measure in ("bits", "change", "relative"):
            browser.choose("#measure", measure)
            browser.run("new Promise((done) => setTimeout(done, 200))")
        texts = browser.run(TEXTS)
    assert any(text.startswith("fp8") for text, _, _ in texts)
    poor = {t: _contrast(ink, ground) for t, ink, ground in texts if _contrast(ink, ground) < 4.5}
    assert not poor
