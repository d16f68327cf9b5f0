"""Who imports whom, beyond what `lint-imports` holds against the map in setup.cfg."""

from __future__ import annotations

import graphlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import grimp

import mixedprec_plugin
from tests.checkpoints import write_llama

# what decides from files alone, without what of a method needs torch or SGLang
ROOMS = ("names", "resources", "errors", "families", "methods", "preset", "plan", "cli")
NOT_OF_FILES = (".codec", ".sglang", ".marlin_experts")


def test_no_circle_of_files() -> None:
    """Imports inside functions count, and those of a package's own `__init__`."""
    graph = grimp.build_graph("mixedprec_plugin", cache_dir=None)
    imports = {file: graph.find_modules_directly_imported_by(file) for file in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()


def test_what_decides_from_files_imports_neither_torch_nor_sglang() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(mixedprec_plugin.__path__, "mixedprec_plugin.")
        if module.name.split(".")[1] in ROOMS and not module.name.endswith(NOT_OF_FILES)
    ]
    assert len(names) > 50
    script = "".join(f"import {name}\n" for name in names)
    script += "import sys\nprint({'torch', 'sglang'} & set(sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_plain_plan_imports_neither_numpy_nor_omegaconf(tmp_path: Path) -> None:
    """Both take a tenth of its time or more."""
    command = ["plan", "--model", str(write_llama(tmp_path / "model")), "--preset", "awq"]
    script = "import sys\nfrom mixedprec_plugin.cli.main import main\n"
    script += f"assert main({command}, sys.stderr) == 0\n"
    script += "print({'torch', 'numpy', 'omegaconf'} & set(sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
