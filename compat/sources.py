"""Python packages as parsed sources: out of a folder, or out of a wheel that stays packed."""

from __future__ import annotations

import ast
import functools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class File:
    """A source file, read and parsed when first asked for.

    Args:
        path: with slashes, from the package's name on (`sglang/srt/plugins/__init__.py`).
        read: reads its text.
    """

    def __init__(self, path: str, read: Callable[[], str]) -> None:
        self.path = path
        self._read = read

    @functools.cached_property
    def text(self) -> str:
        """The source."""
        return self._read()

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.text, self.path)


class Sources:
    """The sources of one or several packages.

    Args:
        version: what they are the sources of, for people.
        files: all of them; of two with one path, the later.
    """

    def __init__(self, version: str, files: Iterable[File]) -> None:
        self.version = version
        self._files = {_module_name(file.path): file for file in files}
        self._folders = {
            ".".join(parts[:size])
            for parts in (module.split(".") for module in self._files)
            for size in range(1, len(parts))
        }

    def __contains__(self, module: str) -> bool:
        return module in self._files

    def holds(self, name: str) -> bool:
        """Whether a dotted name lies in one of the packages."""
        return name.partition(".")[0] in self._files

    def is_folder(self, module: str) -> bool:
        """Whether modules lie below a dotted name; `sglang.srt` has no `__init__`."""
        return module in self._folders

    def path(self, module: str) -> str:
        """The file of a module."""
        return self._files[module].path

    def is_package(self, module: str) -> bool:
        """Whether a module is a folder's `__init__`."""
        return self.path(module).endswith("/__init__.py")

    def text(self, module: str) -> str:
        """The source of a module."""
        return self._files[module].text

    def tree(self, module: str) -> ast.Module | None:
        """The parsed module; None if there is no such module."""
        return self._files[module].tree if module in self._files else None

    def below(self, package: str) -> list[str]:
        """Modules of a package."""
        return sorted(m for m in self._files if f"{m}.".startswith(f"{package}."))

    def mentions(self, pattern: str, package: str, *words: str) -> Iterator[str]:
        """Modules of a package whose source matches a regular expression, unparsed.

        Args:
            pattern: the expression, in which `^` and `$` stand for a line's start and end.
            package: dotted.
            words: plain texts that are part of all matches; they are found much faster.
        """
        compiled = re.compile(pattern, re.MULTILINE)
        for module in self.below(package):
            text = self.text(module)
            if all(word in text for word in words) and compiled.search(text):
                yield module

    def joined(self, other: Sources) -> Sources:
        """These sources and another package's; the version is this one's."""
        return Sources(self.version, [*self._files.values(), *other._files.values()])

    def replaced(self, path: str, text: str) -> Sources:
        """These sources with another text in one file, which may be new."""
        return Sources(self.version, [*self._files.values(), File(path, lambda: text)])


def read_folder(folder: Path, version: str = "") -> Sources:
    """The sources of a package in a folder.

    Args:
        folder: the package's own folder, whose name is the package's.
        version: what to call it.
    """
    return Sources(version, [_file(path, folder) for path in folder.rglob("*.py")])


def read_wheel(wheel: Path, package: str, version: str) -> Sources:
    """The sources of a package in a wheel; the wheel is neither unpacked nor installed."""
    archive = zipfile.ZipFile(wheel)
    names = [n for n in archive.namelist() if n.startswith(f"{package}/") and n.endswith(".py")]
    return Sources(version, [_member(archive, name) for name in names])


def _file(path: Path, folder: Path) -> File:
    name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
    return File(name, lambda: path.read_text(encoding="utf-8"))


def _member(archive: zipfile.ZipFile, name: str) -> File:
    return File(name, lambda: archive.read(name).decode("utf-8"))


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
