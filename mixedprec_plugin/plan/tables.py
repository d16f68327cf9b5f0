"""Text for people: tables that fit the terminal, and whole lines where there is none.

Names in a checkpoint are anybody's: no cell reaches a terminal but through `printable`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TextIO

from mixedprec_plugin.errors import printable

# of ANSI terminals, ECMA-48 8.3.117
_STYLES = {"bold": "1", "red": "1;31", "yellow": "33", "green": "32"}
_GAP = 2
_INDENT = 4
# characters that words need to be read in a column
_PROSE = 32


def styled(text: str, style: str, out: TextIO) -> str:
    """A text in a colour, where `out` is a terminal and NO_COLOR (no-color.org) is not set."""
    if not style or not out.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


class Table:
    """Rows of texts under titles.

    Args:
        columns: title, and whether the cells are numbers, which stand on the right.
        dropped: titles of columns that a narrow terminal goes without, the first one first.
    """

    def __init__(self, *columns: tuple[str, bool], dropped: Sequence[str] = ()) -> None:
        self._titles = [title for title, _ in columns]
        self._are_numbers = [is_number for _, is_number in columns]
        self._dropped = dropped
        self._rows: list[tuple[list[list[str]], str]] = []

    def add(self, *cells: str | Iterable[str], style: str = "") -> None:
        """Add a row; each cell is one line or several."""
        lines = [[cell] if isinstance(cell, str) else cell for cell in cells]
        self._rows.append(([list(map(printable, cell)) for cell in lines], style))

    def lines(self, width: int | None) -> Iterator[tuple[str, str]]:
        """Yield every line with its style, none longer than `width` where that can be had.

        A last column of words is wrapped. Where that is not enough, the first cell of a row gets a
        line of its own, and any other is wrapped between words: no name is cut.
        """
        widths = [
            max([len(title), *(len(line) for cells, _ in self._rows for line in cells[index])])
            for index, title in enumerate(self._titles)
        ]
        kept, is_stacked = list(range(len(widths))), False
        if width is not None and _total(widths, kept) > width:
            prose = width - _total(widths, kept[:-1]) - _GAP
            if self._are_numbers[-1] or prose < max(_PROSE, self._longest_word(kept[-1])):
                is_stacked, kept = True, self._narrowed(widths, width - _INDENT)
            self._shrink(widths, kept, width - _INDENT * is_stacked)
        rules = [["-" * widths[index]] for index in range(len(widths))]
        for cells, style in [([[x] for x in self._titles], "bold"), (rules, ""), *self._rows]:
            if is_stacked:
                yield from ((line, style) for line in cells[0])
            for line in self._laid_out([cells[index] for index in kept], widths, kept):
                text = (" " * _INDENT * is_stacked + line).rstrip()
                if text:
                    yield text, style

    def _longest_word(self, index: int) -> int:
        lines = [line for cells, _ in self._rows for line in cells[index]]
        return max(
            len(word) for line in [self._titles[index], *lines] for word in [*line.split(), ""]
        )

    def _shrink(self, widths: list[int], kept: Sequence[int], width: int) -> None:
        """Take from the widest columns of words, the first one of a row aside, what is too much."""
        least = {
            index: self._longest_word(index)
            for index in kept
            if index and not self._are_numbers[index]
        }
        while _total(widths, kept) > width:
            wide = [index for index, words in least.items() if widths[index] > words]
            if not wide:
                break
            widths[max(wide, key=lambda index: widths[index])] -= 1

    def _narrowed(self, widths: Sequence[int], width: int) -> list[int]:
        """The columns behind the first that fit into a width."""
        kept = list(range(1, len(widths)))
        for title in self._dropped:
            if _total(widths, kept) > width and title in self._titles:
                kept.remove(self._titles.index(title))
        return kept

    def _laid_out(
        self, cells: Sequence[Sequence[str]], widths: Sequence[int], kept: Sequence[int]
    ) -> Iterator[str]:
        wrapped = [
            [part for line in cell for part in wrap(line, widths[index])]
            for cell, index in zip(cells, kept, strict=True)
        ]
        for texts in itertools.zip_longest(*wrapped, fillvalue=""):
            yield (" " * _GAP).join(
                text.rjust(widths[index]) if self._are_numbers[index] else text.ljust(widths[index])
                for text, index in zip(texts, kept, strict=True)
            )


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break a line between words, where it is longer than a width; words are never cut."""
    if len(text) <= width:
        return [text]
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _total(widths: Sequence[int], kept: Collection[int]) -> int:
    return sum(widths[index] + _GAP for index in kept) - _GAP


class Page:
    """Where people read: a terminal, or a file or a pipe, in which no line is broken.

    Args:
        out: what is written to.
        width: characters of a line; the terminal's, if there is one, where none is given.
    """

    def __init__(self, out: TextIO, width: int | None = None) -> None:
        self._out = out
        terminal = shutil.get_terminal_size().columns if out.isatty() else None
        self.width = width or terminal

    def print(self, text: str | Table = "", style: str = "") -> None:
        """Write a line, wrapped on a terminal with two characters more of indent, or a table."""
        for line, its_style in self._lines(text, style):
            print(styled(line, its_style, self._out), file=self._out)

    def _lines(self, text: str | Table, style: str) -> Iterable[tuple[str, str]]:
        if not isinstance(text, str):
            return text.lines(self.width)
        if self.width is None:
            return [(text, style)]
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        return [(line, style) for line in wrap(text, self.width, indent)]
