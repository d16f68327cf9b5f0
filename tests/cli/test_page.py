"""The page of `mixedprec plan --html`, in a headless Chromium, of DeepSeek-V3 with 581 rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mixedprec_plugin.checkpoint.source import open_source
from mixedprec_plugin.cli.page import write_page
from mixedprec_plugin.methods.cards import find_gpu
from mixedprec_plugin.methods.interface import Target
from mixedprec_plugin.plan.model import Plan
from mixedprec_plugin.plan.render import totals
from mixedprec_plugin.plan.resolve import resolve_plan
from mixedprec_plugin.preset.load import load_preset
from tests import published
from tests.browser import Browser, needs_browser
from tests.checkpoints import write_llama
from tests.commands import run
from tests.presets import write_preset


class Planned(NamedTuple):
    """A page and the plan that it is of."""

    page: Path
    plan: Plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.deepseek_v3().write(tmp_path_factory.mktemp("deepseek") / "DeepSeek-V3")


@pytest.fixture(scope="module")
def preset(model: Path) -> Path:
    return _experts_preset(model.parent, published.deepseek_v3())


def _experts_preset(folder: Path, made: published.Published) -> Path:
    path = folder / "experts.yaml"
    rules = '  - {match: "*.mlp.experts.*", method: gptq, requantize: true}\n'
    rules += published.single_expert_rules(made)
    path.write_text(f"version: 1\nrules:\n{rules}")
    return path


@pytest.fixture(scope="module")
def planned(model: Path, preset: Path) -> Planned:
    target = Target(tp_size=8, gpu=find_gpu("H200"))
    plan = resolve_plan(load_preset(preset), open_source(model), target)
    page = model.parent / "plan.html"
    write_page(page, plan, None, [])
    return Planned(page, plan)


@pytest.fixture(scope="module")
def browser(planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.look(1440, 1000)
        yield browser


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def page(browser: Browser, planned: Planned) -> Iterator[Browser]:
    browser.look(1440, 1000)
    browser.open(planned.page)
    yield browser
    assert not browser.errors
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "blob"}


def _text(page: Browser, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).innerText"))


def _number(text: str) -> int:
    return int(re.sub(r"\D", "", text))


@needs_browser
def test_totals_and_card_are_the_plans(page: Browser, planned: Planned) -> None:
    sums = totals(planned.plan)
    exact = page.run("document.querySelector('.figures dd').title")
    assert _number(exact) == sums["bytes"]
    for key in ("bits_per_weight", "bits_per_linear_weight"):
        assert f"{sums[key]:.2f}" in _text(page, ".figures")
    assert f"{sums['layers']:,}" in _text(page, ".figures")
    gigabytes = dict(
        re.findall(
            r"^(weights|KV cache|SGLang's reserve).* ([\d.]+) GB", _text(page, ".card ul"), re.M
        )
    )
    assert sum(map(float, gigabytes.values())) == pytest.approx(141, abs=0.2)
    # on each of 8 ranks an eighth, and what is small on all of them
    assert float(gigabytes["weights"]) == pytest.approx(sums["bytes"] / 8e9, rel=0.02)
    tokens = re.search(r"= ([\d,]+) tokens", _text(page, ".card"))
    assert tokens is not None
    # 61 layers keep a latent vector of 512 numbers and 64 rotated ones, of 2 bytes
    left = _number(tokens[1]) * 61 * (512 + 64) * 2
    assert left == pytest.approx(float(gigabytes["KV cache"]) * 1e9, abs=1e8)
    assert planned.page.stat().st_size < 3_000_000


@needs_browser
def test_hovered_rule_shows_its_layers(page: Browser, planned: Planned) -> None:
    decided = [x for x in planned.plan.layers if x.rule and x.rule.index == 7]
    before = page.run("document.querySelector('#grid').toDataURL()")
    place = page.run(
        """(() => {
            const button = document.querySelectorAll(".rules button")[7];
            button.scrollIntoView({block: "center"});
            const r = button.getBoundingClientRect();
            return [r.left + 20, r.top + 10];
        })()"""
    )
    page.move(*place)
    page.wait("document.querySelector('#found').innerText")
    assert _text(page, "#found").startswith(f"{len(decided):,} layers")
    page.wait(f"document.querySelector('#grid').toDataURL() !== {before!r}")


@needs_browser
def test_clicked_layer_tells_its_rule_with_line_and_the_shadowed_ones(
    page: Browser, planned: Planned, preset: Path
) -> None:
    place = page.run(
        """(() => {
            document.querySelector("#grid").scrollIntoView();
            const r = document.querySelector("#grid").getBoundingClientRect();
            return [r.left + r.width / 2, r.top + 500];
        })()"""
    )
    page.click(*place)
    page.wait("document.querySelector('#layer-name')")
    name = _text(page, "#layer-name")
    layer = planned.plan.by_name[name]
    text = _text(page, ".panel")
    assert layer.rule
    assert layer.stored
    assert f"{layer.stored.description} → {layer.action}" in text
    assert f"{layer.bits_per_weight:.2f} a weight" in text
    lines = preset.read_text().splitlines()
    line = next(n for n, line in enumerate(lines, 1) if n == layer.rule.index + 3)
    assert re.search(
        rf"rule {layer.rule.index}\b.*\n?.*\n?decides · {re.escape(str(preset))}:{line}", text
    )
    expert = name.split(".")[5]
    block = name.split(".")[2]
    matching = [
        n for n, line in enumerate(lines[2:])
        if n == 0 or (f"layers.{block}.mlp" in line
                      and expert in re.findall(r"\{([\d,]+)\}", line)[0].split(","))
    ]  # fmt: skip
    assert matching[-1] == layer.rule.index
    assert text.count("shadowed by") == len(matching) - 1


@needs_browser
def test_keys_reach_a_layer_and_say_it(page: Browser) -> None:
    page.run("document.querySelector('#grid').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.press(key)
    spoken = "document.querySelectorAll('.picture [aria-live]')[1].innerText"
    page.wait(f"{spoken}.startsWith('model.layers.1.')")
    said = page.run(spoken)
    page.press("Enter")
    page.wait("document.querySelector('#layer-name')")
    assert said.startswith(_text(page, "#layer-name"))


@needs_browser
def test_filter_finds_by_glob_method_and_bits(page: Browser, planned: Planned) -> None:
    page.run("document.querySelector('#filter').focus()")
    page.type("*.layers.{3..5}.mlp.experts.1?.up_proj bits<5")
    page.wait("document.querySelector('#found').innerText")
    expected = [
        layer for layer in planned.plan.layers
        if re.fullmatch(r"model\.layers\.[345]\.mlp\.experts\.1.\.up_proj", layer.name)
        and layer.bits_per_weight < 5
    ]  # fmt: skip
    assert _text(page, "#found").startswith(f"{len(expected)} layers")


@needs_browser
def test_preset_that_the_page_gives_back_has_the_bytes_that_it_showed(
    browser: Browser, tmp_path: Path
) -> None:
    made = published.deepseek_v3(6)
    given = ("--model", made.write(tmp_path / "model"), "--gpu", "H200", "--tp", 8)
    preset = _experts_preset(tmp_path, made)
    code, out, err = run(
        "plan", *given, "--preset", preset, "--html", tmp_path / "plan.html", "--json"
    )
    assert code == 0, err
    page = browser
    page.look(1440, 1000)
    page.open(tmp_path / "plan.html")
    as_planned = json.loads(out)["totals"]["bytes"]
    assert _number(page.run("document.querySelector('.figures dd').title")) == as_planned
    page.run("document.querySelectorAll('.rules button')[0].click()")
    page.choose(".panel select", "gptq 8-bit g64")
    page.run("document.querySelector('#filter').focus()")
    page.type("model.layers.4.self_attn.o_proj")
    page.wait("document.querySelectorAll('tbody tr').length === 1")
    page.run("document.querySelector('tbody button').click()")
    page.wait("document.querySelector('#layer-name')")
    page.choose("select[aria-label='of which layers']", "in all blocks")
    page.choose("select[aria-label='method']", "awq 4-bit g32")
    edited = tmp_path / "edited.yaml"
    edited.write_text(str(page.run("document.querySelector('#yaml').value")))
    shown = _number(page.run("document.querySelector('.figures dd').title"))
    assert shown != as_planned
    code, out, err = run("plan", *given, "--preset", edited, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["totals"]["bytes"] == shown
    awq = [x["name"] for x in found["layers"] if x["arguments"].get("group_size") == 32]
    assert awq == [f"model.layers.{n}.self_attn.o_proj" for n in range(6)]
    line = _text(page, "#serve")
    assert line.endswith("--load-format mixedprec --mixedprec-config edited.yaml --tp 8")


@needs_browser
def test_page_fits_a_phone_and_turns_dark(page: Browser) -> None:
    page.look(390, 844, dark=True, phone=True)
    page.wait(
        "innerWidth === 390 && document.querySelector('#grid').getBoundingClientRect().width < 390"
    )
    assert page.run("document.documentElement.scrollWidth") <= 390
    background = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 60


@needs_browser
def test_everything_that_can_be_used_has_a_name(page: Browser) -> None:
    page.run("document.querySelectorAll('.rules button')[0].click()")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    used = {"button", "link", "combobox", "searchbox", "textbox", "application"}
    roles: dict[str, list[str]] = {}
    for node in tree:
        role = node.get("role", {}).get("value", "")
        if role in used and not node.get("ignored"):
            roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert len(roles["application"]) == 2
    assert len(roles["button"]) > 581
    assert all(name.strip() for names in roles.values() for name in names)


@needs_browser
def test_other_preset_and_measured_errors_are_shown_beside(
    browser: Browser, llama: Path, tmp_path: Path
) -> None:
    preset = write_preset(tmp_path / "one", 'match: "*.mlp.*", method: awq')
    other = write_preset(tmp_path / "two", 'match: "*", method: fp8')
    errors = tmp_path / "verify.json"
    record = {"layer": "model.layers.0.mlp.up_proj", "relative_error": 0.125}
    errors.write_text(json.dumps({"layers": [record]}))
    html = tmp_path / "plan.html"
    code, _, err = run("plan", "--model", llama, "--preset", preset, "--html", html,
                       "--against", other, "--overlay", errors)  # fmt: skip
    assert code == 0, err
    browser.look(1440, 1000)
    browser.open(html)
    names = browser.run("[...document.querySelector('#measure').options].map((o) => o.text)")
    assert names == ["bits a weight", "change of bits", "relative error"]
    changes = " ".join(_text(browser, "section[aria-labelledby=changes-title] tbody").split())
    assert "mlp.up_proj 3 awq 4-bit g128 fp8" in changes
    assert "self_attn.q_proj 3 bf16 fp8" in changes
    browser.run(
        "[...document.querySelectorAll('tbody button')]"
        ".find((b) => b.innerText === 'mlp.up_proj').click()"
    )
    browser.wait("document.querySelector('#layer-name')")
    assert "0.125" in _text(browser, ".panel")
