"""When the CPU platform is wanted."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from mixedprec_plugin.cpu import activate as module
from mixedprec_plugin.cpu.activate import GROUP, NAME, PLATFORM_CLASS, activate

OURS = EntryPoint(NAME, "mixedprec_plugin.cpu.activate:activate", GROUP)
OTHER = EntryPoint("kunlun", "kunlun_sglang:activate", GROUP)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """No accelerator, no other plugin, no variable set."""
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(module, "has_accelerator", lambda: False)
    monkeypatch.setattr(module, "entry_points", lambda group: [OURS])


def test_bare_machine_gets_the_platform():
    assert activate() == PLATFORM_CLASS


def test_accelerator_keeps_it_away(monkeypatch):
    monkeypatch.setattr(module, "has_accelerator", lambda: True)
    assert activate() is None


def test_its_own_name_wins_over_an_accelerator(monkeypatch):
    monkeypatch.setattr(module, "has_accelerator", lambda: True)
    monkeypatch.setenv("SGLANG_PLATFORM", NAME)
    assert activate() == PLATFORM_CLASS


def test_another_name_keeps_it_away(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "kunlun")
    assert activate() is None


def test_sglangs_own_cpu_engine_keeps_it_away(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_another_platform_plugin_keeps_it_away(monkeypatch):
    monkeypatch.setattr(module, "entry_points", lambda group: [OURS, OTHER])
    assert activate() is None


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_any_device_of_torch_is_an_accelerator(monkeypatch, name):
    import torch

    monkeypatch.undo()
    monkeypatch.setattr(getattr(torch, name), "is_available", lambda: True)
    assert module.has_accelerator()


def test_import_costs_neither_torch_nor_sglang():
    code = (
        "import sys, mixedprec_plugin.cpu.activate;"
        "print([name for name in ('torch', 'sglang') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
