"""The installed SGLang fits, and a copy of it with one thing changed does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compat.check import Checker, Finding
from compat.sources import Sources

_ROOT = Path(__file__).resolve().parents[2]


def changed(sources: Sources, module: str, old: str, new: str) -> Sources:
    """The sources with one text replaced in one module, where it must be."""
    text = sources.text(module)
    assert old in text, f"{module} has no {old!r}"
    return sources.replaced(sources.path(module), text.replace(old, new))


def line_at(where: str) -> str:
    """The line of ours that a finding points at."""
    path, _, line = where.rpartition(":")
    return (_ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def found(checker: Checker, sources: Sources) -> list[Finding]:
    findings = checker.check(sources)
    assert findings
    return findings


def test_the_installed_sglang_lacks_nothing(checker: Checker, sglang_sources: Sources) -> None:
    assert [str(finding) for finding in checker.check(sglang_sources)] == []


@pytest.mark.sglang
def test_all_hooks_are_read(checker: Checker) -> None:
    from mixedprec_plugin.serving.hooks import CPU_HOOKS, HOOKS

    hooks = HOOKS + CPU_HOOKS
    assert [row.target for row in checker.hooks] == [hook.target for hook in hooks]
    names = [row.function.name for row in checker.hooks]
    assert names == [hook.function.__name__ for hook in hooks]


_QUANTIZATION = "sglang.srt.layers.quantization"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
_CHANGES = [
    pytest.param(
        f"{_QUANTIZATION}.fp8",
        "        weight_block_size: List[int] = None,\n",
        "        block_shape: List[int] = None,\n",
        ("fp8", "def config_arguments(", "does not take weight_block_size (takes"),
        id="constructor argument renamed",
    ),
    pytest.param(
        f"{_QUANTIZATION}.blockwise_int8",
        "class BlockInt8Config(",
        "class Int8BlockConfig(",
        ("blockwise_int8", "def config_arguments(", "no BlockInt8Config in"),
        id="config class renamed",
    ),
    pytest.param(
        "sglang.srt.configs.load_config",
        "def _verify_load_format(",
        "def _check_load_format(",
        ("hooks", "Hook(", "no _verify_load_format in"),
        id="hook target removed",
    ),
    pytest.param(
        _UPDATER,
        "        model_path: str,\n        load_format: str,\n",
        "        path: str,\n        load_format: str,\n",
        ("update_weights_from_disk", "Hook(", "has no parameter model_path"),
        id="parameter of a hook target renamed",
    ),
    pytest.param(
        "sglang.srt.server_args",
        "    @classmethod\n    def from_cli_args(cls, ",
        "    @staticmethod\n    def from_cli_args(",
        ("hooks", "Hook(", "is a staticmethod (expected a classmethod)"),
        id="kind of a hook target changed",
    ),
    pytest.param(
        "sglang.srt.arg_groups.choices",
        "add_load_format_choices = ",
        "add_formats = ",
        ("hooks", "add_load_format_choices", "no add_load_format_choices in"),
        id="load format choices renamed",
    ),
    pytest.param(
        "sglang.srt.model_loader.loader",
        "def postprocess_weights(",
        "def finish_weights(",
        ("loader", "self.postprocess_weights(", "has no postprocess_weights"),
        id="inherited method renamed",
    ),
    pytest.param(
        "sglang.srt.model_loader.loader",
        "def _initialize_model(\n    model_config: ModelConfig,\n",
        "def _initialize_model(\n    model_config: ModelConfig,\n    device: str,\n    *,\n",
        ("loader", "_initialize_model(", "too many positional arguments"),
        id="signature of a called function changed",
    ),
    pytest.param(
        "sglang.srt.layers.linear",
        '    "AWQLinearMethod",\n',
        "",
        ("CPU platform", "class AWQLinearMethod(", "does not name AWQLinearMethod"),
        id="weight loader forgets a class",
    ),
    pytest.param(
        "sglang.srt.platforms.interface",
        "def apply_server_args_defaults(",
        "def set_server_args_defaults(",
        ("CPU platform", "def apply_server_args_defaults(", "SGLang does not call ours"),
        id="overridden method renamed",
    ),
    pytest.param(
        "sglang.srt.managers.scheduler",
        "load_plugins()",
        "pass",
        ("plugin framework", "", "does not load plugins"),
        id="plugins not loaded in the ranks",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "old", "new", "expected"), _CHANGES)
def test_a_change_is_found_with_our_line(
    checker: Checker,
    sglang_sources: Sources,
    module: str,
    old: str,
    new: str,
    expected: tuple[str, str, str],
) -> None:
    feature, ours, what = expected
    findings = found(checker, changed(sglang_sources, module, old, new))
    matching = [f for f in findings if f.feature == feature and what in f.what]
    assert matching, [str(finding) for finding in findings]
    if ours:
        assert ours in line_at(matching[0].where)


def test_a_moved_class_is_found_where_it_is(checker: Checker, sglang_sources: Sources) -> None:
    fp8 = f"{_QUANTIZATION}.fp8"
    moved = sglang_sources.replaced(
        "sglang/srt/layers/quantization/fp8_new.py", sglang_sources.text(fp8)
    )
    moved = changed(moved, fp8, "class Fp8Config(", "class OldFp8Config(")
    finding = next(f for f in found(checker, moved) if f.feature == "fp8")
    assert finding.moved == (f"{_QUANTIZATION}.fp8_new.Fp8Config (the arguments fit there)",)


def test_a_removed_server_argument_is_found(checker: Checker, sglang_sources: Sources) -> None:
    sources, num_changed = sglang_sources, 0
    for module in sglang_sources.below("sglang.srt.arg_groups"):
        text = sglang_sources.text(module)
        new = re.sub(r"^    sleep_on_idle:", "    rest_on_idle:", text, flags=re.MULTILINE)
        if new != text:
            sources, num_changed = sources.replaced(sources.path(module), new), num_changed + 1
    assert num_changed == 1
    (finding,) = found(checker, sources)
    assert finding.feature == "CPU platform"
    assert finding.target == "sglang.srt.server_args.ServerArgs.sleep_on_idle"
    assert "server_args.sleep_on_idle = True" in line_at(finding.where)


@pytest.mark.parametrize(("version", "is_lacking"), [("0.5.22", False), ("99.0", True)])
def test_option_that_an_older_release_has_not_is_nothing_that_it_lacks(
    checker: Checker, sglang_sources: Sources, version: str, is_lacking: bool
) -> None:
    """What cannot be given need not be refused; what a newer one renamed is refused no more."""
    definition = "    enable_paged_experts:"
    (module,) = sglang_sources.mentions(f"^{definition}", "sglang.srt")
    other = changed(sglang_sources, module, definition, "    enable_paged:")
    other.version = version
    targets = [finding.target.rpartition(".")[2] for finding in checker.check(other)]
    assert ("enable_paged_experts" in targets) == is_lacking
