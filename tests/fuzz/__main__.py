"""`python -m tests.fuzz`: try many inputs; exit code 1 where any is a finding."""

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
    parser.add_argument("--minutes", type=float, help="how long; 10 where --inputs is left out")
    parser.add_argument("--inputs", type=int, default=1 << 60, help="how many, over all jobs")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=None, help="of the changes; random if left out")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where findings go")
    args = parser.parse_args()
    minutes = args.minutes or (10 if args.inputs == 1 << 60 else float("inf"))
    numbers = [len(range(job, args.inputs, args.jobs)) for job in range(args.jobs)]
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    start = time.monotonic()
    counts: collections.Counter[int] = collections.Counter()
    findings: dict[str, tuple[str, str, int]] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        tasks = [
            pool.submit(work, minutes * 60, num, seed + job) for job, num in enumerate(numbers)
        ]
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
