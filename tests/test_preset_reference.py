from __future__ import annotations

from benchmarks.preset_reference import PAGE, filled


def test_tables_are_what_the_methods_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text, "run 'make schemas'"


def test_a_table_that_differs_is_noticed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text.replace("Bits a weight", "Bits")) == text
