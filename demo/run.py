"""`make demo`: a real model with a preset that ships, measured, served and asked a question.

python -m demo.run [--preset PRESET] [--question TEXT]
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
PRESET = "attention-fp8-mlp-int4"
# a page of it: two windows of 256 tokens
TEXT = ROOT / "benchmarks" / "data" / "prose.txt"
PAGE = ["--windows", "2", "--length", "256"]
QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
_ANSWER_TOKENS = 64
_MIB = 2**20


class DemoError(Exception):
    """A step of the demo failed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return 0 if the server gave a sensible answer, 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m demo.run")
    parser.add_argument("--preset", default=PRESET, help="a file, or one that ships")
    parser.add_argument("--question", default=QUESTION)
    options = parser.parse_args(arguments)
    try:
        run(options.preset, options.question)
    except (DemoError, DemoModelError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(preset: str, question: str) -> None:
    """Build the model if it is not cached, print the plan, measure, serve, ask, stop.

    Raises:
        DemoModelError, DemoError, ServerError: the model, the plan or the server failed.
    """
    begin = time.monotonic()
    print(_where())
    _heading("1. The model: SmolLM2-135M-Instruct, hidden size padded to 768")
    model_path = checkpoint("widened")
    print(model_path)
    flags = ["--model", str(model_path), "--preset", preset]
    _heading("2. The plan: what each layer runs in")
    _mixedprec("plan", *flags)
    totals = json.loads(_mixedprec("plan", *flags, "--json", is_shown=False))["totals"]
    _heading("3. What it costs: both models' predictions of a page of text")
    _mixedprec("eval", *flags, "--text", str(TEXT), *PAGE)
    _heading("4. The server")
    with tempfile.TemporaryDirectory(prefix="mixedprec-demo-") as folder:
        server = Server(model_path, Path(folder) / "server.log", Path(preset))
        print(f"$ {shlex.join(server.command)}", flush=True)
        with server:
            print(f"ready after {server.ready_seconds:.0f} s", flush=True)
            _heading("5. A question over /v1/chat/completions")
            print(f"> {question}", flush=True)
            answer, seconds = ask(server, question)
            print(f"mixed, served          {_indented(answer)}", flush=True)
    print(f"unquantized            {_indented(unquantized_answer(model_path, question))}")
    _check_answer(answer, question)
    _heading("Done; the server has stopped")
    served, unquantized = totals["bytes"] / _MIB, totals["bytes_unquantized"] / _MIB
    print(f"weights  {served:.0f} MiB instead of {unquantized:.0f} MiB in bf16: "
          f"{unquantized - served:.0f} MiB ({1 - served / unquantized:.0%}) saved")  # fmt: skip
    print(f"time     {time.monotonic() - begin:.0f} s, of which the answer {seconds:.1f} s")
    _heading("Next, with a preset of your own")
    for command in next_commands(model_path, preset):
        print(shlex.join(command))


def next_commands(model_path: Path, preset: str) -> list[list[str]]:
    """What to type after the demo, in order, from any folder that holds no mine.yaml yet."""
    program, model = _program(), ["--model", str(model_path)]
    mine = ["--preset", "mine.yaml"]
    return [
        [program, "presets", "copy", preset, "mine.yaml"],
        [program, "plan", *model, *mine, "--html", "plan.html"],
        [program, "explain", "model.layers.0.mlp.down_proj", *model, *mine],
        [program, "eval", *model, *mine, "--text", str(TEXT), *PAGE],
        [program, "serve", "mine.yaml", *model],
    ]


def ask(server: Server, question: str) -> tuple[str, float]:
    """Ask a chat question, greedily; return the answer and the seconds it took."""
    body = {
        "model": "default",
        "messages": _chat(question),
        "temperature": 0,
        "max_tokens": _ANSWER_TOKENS,
    }
    start = time.monotonic()
    response = server.request("/v1/chat/completions", body)
    answer: str = response["choices"][0]["message"]["content"] or ""
    return answer.strip(), time.monotonic() - start


def unquantized_answer(model_path: Path, question: str) -> str:
    """What the unquantized model answers, greedily, in transformers and float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        _chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**prompt, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    answer: str = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], True)
    return answer.strip()


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _where() -> str:
    """What it is going to run on."""
    import torch

    if torch.cuda.is_available():
        return f"Running on {torch.cuda.get_device_name()}."
    return (
        "Running on the CPU: there is no GPU here. The plugin's CPU platform computes what\n"
        "SGLang's CUDA kernels compute, but slowly: times here say nothing about a GPU."
    )


def _check_answer(answer: str, question: str) -> None:
    """The question that ships has one right answer; another one needs words."""
    fits = EXPECTED in answer if question == QUESTION else any(c.isalpha() for c in answer)
    if not fits:
        raise DemoError(f"the answer makes no sense: {answer!r}")


def _program() -> str:
    return str(Path(sys.executable).parent / "mixedprec")


def _mixedprec(*arguments: str, is_shown: bool = True) -> str:
    """Run a verb; where it is shown, it writes to the terminal itself."""
    command = [_program(), *arguments]
    if is_shown:
        print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(
        command, stdout=None if is_shown else subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise DemoError(f"{shlex.join(command)} ended with exit code {done.returncode}")
    return done.stdout or ""


def _indented(text: str) -> str:
    return text.replace("\n", f"\n{'':23}")


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
