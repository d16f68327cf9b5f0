from __future__ import annotations

import pytest

from compat.check import METHOD_FEATURES, Finding
from compat.releases import never_released
from compat.report import BEGIN, END, missing, rewritten, table, whole

_LACKING = Finding("hooks", "ours.py:3", "sglang.f", "no f in sglang", ("sglang.g.f",))
_RESULTS: dict[str, list[Finding]] = {"0.4.7": [], "0.5.1": [_LACKING], "0.5.2": []}


def test_table_counts_what_is_missing_and_leaves_out_what_was_not_looked_at() -> None:
    lines = table(_RESULTS, ["0.4.7"]).splitlines()
    assert lines[2] == "| 0.4.7 |  |  |  |  |  |" + " ok |" * len(METHOD_FEATURES) + "  |  |"
    assert lines[3] == "| 0.5.1 | ok | 1 missing |" + " ok |" * (len(METHOD_FEATURES) + 5)


def test_lists_name_our_line_and_the_new_place() -> None:
    assert missing(_RESULTS) == (
        "### 0.5.1\n\n- hooks: `ours.py:3`: `sglang.f`: no f in sglang; defined in sglang.g.f\n"
    )
    assert missing({"0.5.2": []}) == "Nothing is missing.\n"
    assert whole(_RESULTS) == ["0.4.7", "0.5.2"]


def test_page_keeps_what_is_outside_the_marks() -> None:
    page = f"before\n{BEGIN}old\n{END}after\n"
    assert rewritten(page, "new\n") == f"before\n{BEGIN}new\n{END}after\n"
    with pytest.raises(ValueError, match="substring not found"):
        rewritten("no marks", "new\n")


def test_numbers_left_out_are_named() -> None:
    assert never_released(["0.5.17", "0.5.19", "0.5.19.post1"]) == ["0.5.18"]
    assert never_released(["0.5.17", "0.5.18"]) == []
