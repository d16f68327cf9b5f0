"""What is built for others to install: it is complete, and works outside of the tree."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from mixedprec_plugin import __version__
from tests import published

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("mixedprec_plugin", "configs", "schemas")
FILES = (
    "pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
    "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", ".dockerignore",
)  # fmt: skip


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist and the wheel that is built of it, from a copy of what git has."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "node_modules")
        shutil.copytree(ROOT / part, tree / part, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel alone is installed in."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    alone = ["--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run([*pip, *alone], check=True)
    return folder


def _mixedprec(site: Path, folder: Path, *words: str) -> str:
    """Run the installed command in a folder outside of the tree."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", str(site / "bin" / "mixedprec"), *words],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_module_and_every_file_that_is_read(wheel: Path) -> None:
    package = ROOT / "mixedprec_plugin"
    expected = {path.relative_to(ROOT) for path in package.rglob("*.py")}
    expected |= {
        Path("mixedprec_plugin") / path.relative_to(ROOT)
        for folder, kind in (("configs", "*.yaml"), ("schemas", "*.json"))
        for path in (ROOT / folder).rglob(kind)
    }
    others = ("py.typed", "page/page.html", "page/scale.json")
    expected |= {Path("mixedprec_plugin") / name for name in others}
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {path for path in expected if "node_modules" not in path.parts}


def test_sdist_holds_the_source_of_the_page_and_no_tests(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = (ROOT / "mixedprec_plugin" / "page" / "src").iterdir()
    assert {str(path.relative_to(ROOT)) for path in source} <= names
    assert {"CHANGELOG.md", "LICENSE", "mixedprec_plugin/page/package-lock.json"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_version_stands_in_one_place(dist: Path, site: Path, tmp_path: Path) -> None:
    assert _mixedprec(site, tmp_path, "--version").strip() == __version__
    assert {path.name.split("-")[1].removesuffix(".tar.gz") for path in dist.glob("m*-*")} == {
        __version__
    }
    holders = [name for name in FILES if __version__ in (ROOT / name).read_text(encoding="utf-8")]
    assert holders == []


def test_installed_wheel_plans_outside_of_the_tree(site: Path, tmp_path: Path) -> None:
    model = published.qwen3_30b_a3b(2).write(tmp_path / "model")
    flags = ["plan", "--model", str(model), "--preset", "qwen3-30b-a3b"]
    plan: dict[str, Any] = json.loads(_mixedprec(site, tmp_path, *flags, "--json"))
    assert plan["totals"]["bytes"] < plan["totals"]["bytes_unquantized"]
    _mixedprec(site, tmp_path, *flags, "--html", "plan.html")
    assert "qwen3-30b-a3b" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    copied = _mixedprec(site, tmp_path, "presets", "copy", "awq")
    assert copied.startswith("awq.yaml")
    assert str(site) in (tmp_path / "awq.yaml").read_text(encoding="utf-8").splitlines()[0]


def test_installing_beside_sglang_changes_no_version_that_it_pins() -> None:
    pinned = {
        found.name.lower().replace("_", "-"): found.specifier
        for found in map(Requirement, requires("sglang") or [])
        if found.marker is None and str(found.specifier).startswith("==")
    }
    assert "transformers" in pinned
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options"]["install_requires"].splitlines():
        if line and not line.startswith("#"):
            ours = Requirement(line)
            pin = next(iter(pinned.get(ours.name.lower().replace("_", "-"), [])), None)
            assert pin is None or ours.specifier.contains(pin.version), (line, str(pin))


def test_dockerfile_copies_what_the_build_needs_onto_the_tested_sglang() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (tag,) = re.findall(r"^ARG SGLANG_TAG=v(\S+)$", text, re.M)
    assert f"Developed against SGLang {tag}." in (ROOT / "README.md").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert copied == {*PARTS, "pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE"}
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert set(let_in) == copied
