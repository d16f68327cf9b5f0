"""What became of every cell of a card, made once for all tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.dryrun.cards import CARDS
from tests.dryrun.matrix import read_result, run_cards
from tests.dryrun.tables import Result

# the most and the least that runs; the others are left to `make dryrun`
ALWAYS = ("H100", "RTX 2080 Ti")
TITLES = [
    pytest.param(title, marks=() if title in ALWAYS else pytest.mark.every_card) for title in CARDS
]
Results = Callable[[str], Result]


@pytest.fixture(scope="session")
def result_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Title of a card -> its results: from MIXEDPREC_DRYRUN, where they were made before, or run.

    The cards that the chosen tests ask for are run together, by one of several processes of tests.
    """
    made = os.environ.get("MIXEDPREC_DRYRUN")
    found: dict[str, Result] = {}
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cards"

    def result(title: str) -> Result:
        if made:
            return read_result(Path(made), title)
        if title not in found:
            asked = {_title(item) for item in request.session.items} | {title}
            shared.mkdir(exist_ok=True)
            with (shared / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                missing = [name for name in CARDS if not (shared / f"{name}.json").exists()]
                if wanted := [name for name in missing if name in asked]:
                    run_cards(shared, wanted)
            found[title] = read_result(shared, title)
        return found[title]

    return result


def _title(item: pytest.Item) -> str:
    """The card that a test asks results of; "" if it asks for none."""
    if "result_of" not in getattr(item, "fixturenames", ()):
        return ""
    params: Mapping[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    return str(params.get("title", ""))
