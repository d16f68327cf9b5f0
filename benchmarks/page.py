"""Time and size of the pages of the largest models, with rules for single experts.

`python -m benchmarks.page`.

How long a filter takes is asked of a headless Chromium, from the letter typed to the frame drawn.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Figure, keep
from tests import published
from tests.browser import Browser, browser_path

_RULES = '  - {match: "*.mlp.experts.*", method: gptq, requantize: true}\n'
_FILTERS = ("experts", "*.mlp.experts.{0..99}.*", "bits<5 down_proj", "method:awq", "fault", "")
_TYPED = """
new Promise((done) => {
    const input = document.querySelector("#filter");
    input.value = TEXT;
    const start = performance.now();
    input.dispatchEvent(new Event("input", {bubbles: true}));
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})
"""


def main() -> int:
    """Make and open the page of each model; 1 where a filter takes longer than it may."""
    figures = []
    for model, made in (("DeepSeek-V3", published.deepseek_v3), ("Kimi-K2", published.kimi_k2)):
        figures += _measure(model, made())
    return int(not keep("page", figures))


def _measure(name: str, made: published.Published) -> list[Figure]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        folder = Path(root)
        model = made.write(folder / name)
        preset = folder / "experts.yaml"
        rules = _RULES + published.single_expert_rules(made)
        preset.write_text(f"version: 1\nrules:\n{rules}", encoding="utf-8")
        page = folder / "plan.html"
        command = [
            sys.executable, "-m", "mixedprec_plugin", "plan", "--model", str(model),
            "--preset", str(preset), "--gpu", "H200", "--tp", "8",
        ]  # fmt: skip
        plain, cpu = _timed(command), _timed([*command, "--html", str(page)])
        figures = [
            Figure(f"{name}, plan --html, s of processor", cpu, plain),
            Figure(f"{name}, page, MB", page.stat().st_size / 1e6),
        ]
        return figures + (_browse(name, page, folder / "profile") if browser_path() else [])


def _timed(command: list[str]) -> float:
    """Seconds of a processor that a command takes."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system
    return used - before.children_user - before.children_system


def _browse(name: str, page: Path, profile: Path) -> list[Figure]:
    with Browser(profile) as browser:
        browser.look(1440, 1000)
        start = time.perf_counter()
        browser.open(page)
        figures = [Figure(f"{name}, opened and drawn, s", time.perf_counter() - start)]
        for when in ("first", "again"):
            took = [browser.run(_TYPED.replace("TEXT", repr(text))) for text in _FILTERS]
            figures.append(Figure(f"{name}, slowest filter, {when}, ms", max(took), limit=100))
        return figures


if __name__ == "__main__":
    raise SystemExit(main())
