"""What of SGLang the plugin needs, release by release, read out of the wheels.

python -m compat [--out docs/compat.md] [VERSION ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compat import releases
from compat.check import METHOD_FEATURES, Checker, Finding
from compat.report import missing, rewritten, table, whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Check releases, print the tables, and write them into a page.

    Returns:
        0 if the newest release checked lacks nothing, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m compat", description=__doc__)
    parser.add_argument("versions", nargs="*", help="releases; none: all since plugins exist")
    parser.add_argument("--out", type=Path, help="Markdown page whose tables are rewritten")
    options = parser.parse_args(arguments)
    listed = options.versions or releases.listed_versions()
    reference = releases.installed()
    checker = Checker(releases.own(), reference)
    results: dict[str, list[Finding]] = {}
    if not options.versions:
        version = releases.CONSTRUCTORS_ONLY
        found = checker.check(releases.release(version))
        results[version] = [finding for finding in found if finding.feature in METHOD_FEATURES]
    for version in listed:
        print(f"sglang {version}", file=sys.stderr, flush=True)
        results[version] = checker.check(releases.release(version))
    block = _block(results, listed, reference.version)
    sys.stdout.write(block)
    if options.out:
        page = options.out.read_text(encoding="utf-8")
        options.out.write_text(rewritten(page, block), encoding="utf-8")
    return 1 if results[listed[-1]] else 0


def _block(results: dict[str, list[Finding]], listed: Sequence[str], reference: str) -> str:
    gaps = releases.never_released(list(listed))
    gap = f"Never released: {', '.join(gaps)}." if gaps else "No number between them was left out."
    found = whole(results)
    return (
        f"Written for SGLang {reference}. {gap} "
        f"Releases that lack nothing: {', '.join(found) or 'none'}.\n\n"
        f"{table(results, [releases.CONSTRUCTORS_ONLY])}\n"
        f"## What is missing\n\n{missing(results)}"
    )


if __name__ == "__main__":
    sys.exit(main())
