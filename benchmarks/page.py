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
    """Print a line for each figure."""
    for model, made in (("DeepSeek-V3", published.deepseek_v3), ("Kimi-K2", published.kimi_k2)):
        print(model)
        _measure(model, made())
    return 0


def _measure(name: str, made: published.Published) -> None:
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
        plain, _ = _timed(command)
        wall, cpu = _timed([*command, "--html", str(page)])
        print(f"  plan: {plain:.1f} s; with --html: {wall:.1f} s, {cpu:.1f} s of processor")
        print(f"  page: {page.stat().st_size / 1e6:.2f} MB")
        if browser_path():
            _browse(page, folder / "profile")


def _timed(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and those of a processor."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    return wall, used - before.children_user - before.children_system


def _browse(page: Path, profile: Path) -> None:
    with Browser(profile) as browser:
        browser.look(1440, 1000)
        start = time.perf_counter()
        browser.open(page)
        print(f"  opened and drawn: {time.perf_counter() - start:.2f} s")
        for text in (*_FILTERS, *_FILTERS):
            took = browser.run(_TYPED.replace("TEXT", repr(text)))
            print(f"  filter {text!r}: {took:.0f} ms")


if __name__ == "__main__":
    raise SystemExit(main())
