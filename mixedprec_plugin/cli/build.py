"""`mixedprec plan --build`: SGLang's model, built without weights in a process of its own.

So the verb itself needs neither torch nor SGLang, and what SGLang prints stays off its output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from mixedprec_plugin.errors import LoadError, MixedPrecisionError, Problem
from mixedprec_plugin.plan.model import Plan

_ASKED = ("model", "preset", "overrides", "tp", "dtype", "device", "gpu", "draft_model")
# lines of the process's own words that are repeated where it dies
_NUM_LINES = 5


def with_build(args: argparse.Namespace, plans: list[Plan]) -> list[Plan]:
    """Hold plans, of the model and its draft model, against what SGLang builds of them.

    They are returned with the problems that were found; what could not be checked is a warning.
    """
    if any(plan.errors for plan in plans):
        return plans
    asked = json.dumps({key: getattr(args, key) for key in _ASKED})
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["SGLANG_PLATFORM"] = "mixedprec_cpu"
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment)
    if done.returncode:
        words = " / ".join(done.stderr.strip().splitlines()[-_NUM_LINES:])
        remedy = "look whether mixedprec doctor finds anything, or plan without --build"
        raise LoadError(Problem("--build", f"the process that builds died ({words})", remedy))
    found = [[Problem(**problem) for problem in each] for each in json.loads(done.stdout)]
    return [
        dataclasses.replace(plan, problems=(*plan.problems, *problems))
        for plan, problems in zip(plans, found, strict=True)
    ]


def _build(args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """The problems of each plan, as plain data."""
    from mixedprec_plugin.cli.planning import make_draft_plan, make_plan
    from mixedprec_plugin.serving.alone import outline_alone

    plan = make_plan(args)
    plans = [each for each in (plan, make_draft_plan(args, plan)) if each is not None]
    found = []
    for index, plan in enumerate(plans):
        try:
            outline = outline_alone(plan, is_draft=index > 0)
            problems = list(outline.problems)
            if outline.unchecked:
                what = f"not checked against the model: {outline.unchecked}"
                remedy = "start the server to see"
                problems.append(Problem("--build", what, remedy, "unchecked", "warning"))
        except MixedPrecisionError as error:
            problems = list(error.problems)
        found.append([dataclasses.asdict(problem) for problem in problems])
    return found


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(_build(argparse.Namespace(**json.load(sys.stdin))), answers)
    answers.close()
