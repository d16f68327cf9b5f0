"""`make demo`: serve a real model with a preset that ships, and ask it a question.

python -m demo.run [--preset FILE] [--question TEXT]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo.gguf_model import DemoModelError
from demo.model import checkpoint
from mixedprec_plugin.evaluate.server import Server, ServerError

ROOT = Path(__file__).resolve().parents[1]
PRESET = ROOT / "configs" / "presets" / "attention-fp8-mlp-int4.yaml"
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
_MIB = 2**20


class DemoError(Exception):
    """A step of the demo failed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return 0 if the server gave a sensible answer, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m demo.run")
    parser.add_argument("--preset", type=Path, default=PRESET)
    parser.add_argument("--question", default=QUESTION)
    options = parser.parse_args(arguments)
    try:
        run(options.preset, options.question)
    except (DemoError, DemoModelError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(preset_path: Path, question: str) -> None:
    """Build the model if it is not cached, print the plan, serve, ask, stop.

    Raises:
        DemoModelError, DemoError, ServerError: the model, the plan or the server failed.
    """
    _heading("1. The model: SmolLM2-135M-Instruct, hidden size padded to 768")
    model_path = checkpoint("widened")
    print(model_path)
    _heading("2. The plan: what each layer runs in")
    flags = ["--model", str(model_path), "--preset", str(preset_path)]
    print(_mixedprec("plan", *flags), end="")
    totals = json.loads(_mixedprec("plan", *flags, "--json"))["totals"]
    _heading("3. The server")
    with tempfile.TemporaryDirectory(prefix="mixedprec-demo-") as folder:
        server = Server(model_path, Path(folder) / "server.log", preset_path)
        print(shlex.join(server.command), flush=True)
        start = time.monotonic()
        with server:
            print(f"ready after {server.ready_seconds:.0f} s", flush=True)
            _heading("4. A question over /v1/chat/completions")
            print(f"> {question}", flush=True)
            answer, seconds = ask(server, question)
            print(answer)
            first_answer_seconds = time.monotonic() - start
    _check_answer(answer, question)
    _heading("Done; the server has stopped")
    _print_summary(totals, seconds, first_answer_seconds)


def ask(server: Server, question: str) -> tuple[str, float]:
    """Ask a chat question, greedily; return the answer and the seconds it took."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
    }
    start = time.monotonic()
    response = server.request("/v1/chat/completions", body)
    answer: str = response["choices"][0]["message"]["content"] or ""
    return answer.strip(), time.monotonic() - start


def _check_answer(answer: str, question: str) -> None:
    """The question that ships has one right answer; another one needs words."""
    fits = EXPECTED in answer if question == QUESTION else any(c.isalpha() for c in answer)
    if not fits:
        raise DemoError(f"the answer makes no sense: {answer!r}")


def _mixedprec(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "mixedprec"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def _print_summary(totals: dict[str, Any], seconds: float, first_answer_seconds: float) -> None:
    served, unquantized = totals["bytes"] / _MIB, totals["bytes_unquantized"] / _MIB
    print(f"weights      {served:.0f} MiB instead of {unquantized:.0f} MiB in bf16: "
          f"{unquantized - served:.0f} MiB ({1 - served / unquantized:.0%}) saved")  # fmt: skip
    print(
        f"first answer {first_answer_seconds:.0f} s after the start, the question {seconds:.1f} s"
    )


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
