"""`python -m tests.fuzz`: try inputs for some minutes; exit code 1 where any is a finding."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

from tests.fuzz.campaign import work


def main() -> int:
    """Run a campaign on each processor, print what became of the inputs, and write findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=None, help="of the changes; random if left out")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where findings go")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    start = time.monotonic()
    counts: collections.Counter[int] = collections.Counter()
    findings: dict[str, tuple[str, str, int]] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        tasks = [pool.submit(work, args.minutes * 60, seed + job) for job in range(args.jobs)]
        for task in tasks:
            counted, found = task.result()
            counts.update(counted)
            for name, (text, details, num) in found.items():
                before = findings.get(name, (text, details, 0))
                shortest = min((text, details), before[:2], key=lambda pair: len(pair[0]))
                findings[name] = (*shortest, before[2] + num)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (name, (text, details, num)) in enumerate(sorted(findings.items())):
        path = args.out / f"finding-{seed}-{number}.json"
        path.write_text(text)
        print(f"{name}, {num} times: {path}\n{details.strip()}\n")
    seconds = time.monotonic() - start
    said = ", ".join(f"exit code {code}: {counts[code]}" for code in (0, 1, 2))
    total = counts.total()
    print(f"{total} inputs in {seconds:.0f} s ({total / seconds:.0f} a second), seed {seed}")
    print(f"{said}, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
