"""Compare what one rank and two ranks generate, greedily, for every method.

    python -m benchmarks.tensor_parallel [--dtype float16 ...] [--out docs/tensor_parallel.md]

The engine's model runner is built on the CPU platform with one rank and then with two, and loads
the widened demo model in one method after the other. All prompts run as one batch; the best logits
of every step are kept, so that where the tokens part, it shows by how much.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo.model import checkpoint

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("unquantized", "fp8", "fp8_block", "int8", "awq", "gptq", "gptq_int8")
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little girl who",
    "The three primary colors are",
    "In 1969, the first man",
    "The largest planet in the solar system is",
    "Water boils at a temperature of",
    "My favourite recipe for bread begins with",
    "The old lighthouse keeper looked out over the sea and",
    "def fibonacci(n):",
    "Dear Sir or Madam, I am writing to",
)
NUM_TOKENS = 32
_KEPT = 16  # best logits of a step


class RankError(Exception):
    """The process that builds the ranks failed."""


@dataclasses.dataclass(frozen=True)
class Step:
    """The best logits of one prompt's step, the best first; the best is the token taken."""

    tokens: tuple[int, ...]
    logits: tuple[float, ...]


Generated = list[list[Step]]  # for every prompt, its steps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One method, one rank beside two.

    Attributes:
        equal: prompts whose tokens are all the same.
        gaps: for each other prompt, the logit of one rank's token minus that of two ranks' token,
            by one rank, at the first step where they differ: after the same tokens.
        change: mean difference of the best token's logit over the steps before that.
    """

    method: str
    equal: int
    gaps: tuple[float, ...]
    change: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_parallel")
    parser.add_argument("--dtype", action="append", choices=("float16", "bfloat16"))
    parser.add_argument("--out", type=Path, help="write the tables here")
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    dtypes = options.dtype or ["float16", "bfloat16"]
    if options.ranks is not None:
        _run_ranks(options.ranks, dtypes[0], options.folder)
        return 0
    tables = []
    for dtype in dtypes:
        one, two = (generate(num_ranks, dtype) for num_ranks in (1, 2))
        results = [compare(method, one[method], two[method]) for method in METHODS]
        tables.append(table(dtype, results))
        print(tables[-1], flush=True)
    if options.out is not None:
        page = _PAGE.format(
            sglang=version("sglang"), torch=version("torch"), prompts=len(PROMPTS),
            tokens=NUM_TOKENS, tables="\n".join(tables),
        )  # fmt: skip
        options.out.write_text(page, encoding="utf-8")
    return 0


def generate(num_ranks: int, dtype: str) -> dict[str, Generated]:
    """Generate in every method with so many ranks, in a process of its own.

    Raises:
        RankError: the process failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="mixedprec-ranks-") as name:
        folder = Path(name)
        for method in METHODS:
            rules = f'version: 1\nrules:\n  - {{match: "*", method: {method}}}\n'
            (folder / f"{method}.yaml").write_text(rules, encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--dtype", dtype]
        command += ["--ranks", str(num_ranks), "--folder", name]
        print(f"{dtype}, {num_ranks} ranks ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        found = {}
        for method in METHODS:
            path = folder / f"{method}.json"
            if not path.exists():
                end = (done.stdout + done.stderr)[-3000:]
                raise RankError(f"{method}: exit code {done.returncode}\n{end}")
            prompts = json.loads(path.read_text(encoding="utf-8"))
            found[method] = [[Step(**step) for step in steps] for steps in prompts]
        return found


def compare(method: str, one: Generated, two: Generated) -> Comparison:
    """Find where each prompt's tokens part."""
    gaps, changes = [], []
    for left, right in zip(one, two, strict=True):
        same = first_difference(left, right)
        changes += [
            abs(a.logits[0] - b.logits[0]) for a, b in zip(left[:same], right[:same], strict=True)
        ]
        if same < len(left):
            other = right[same].tokens[0]
            at = left[same].tokens.index(other) if other in left[same].tokens else -1
            gaps.append(left[same].logits[0] - left[same].logits[at])
    change = sum(changes) / max(len(changes), 1)
    return Comparison(method, len(one) - len(gaps), tuple(gaps), change)


def first_difference(left: Sequence[Step], right: Sequence[Step]) -> int:
    """The first step with another token; the number of steps if there is none."""
    pairs = enumerate(zip(left, right, strict=True))
    return next((i for i, (a, b) in pairs if a.tokens[0] != b.tokens[0]), len(left))


def table(dtype: str, results: Iterable[Comparison]) -> str:
    """Return one dtype's results as markdown."""
    lines = [
        f"## {dtype}",
        "",
        "| method | prompts with equal tokens | change of the best logit | gaps where they part |",
        "|---|--:|--:|---|",
    ]
    for x in results:
        gaps = ", ".join(f"{gap:.4f}" for gap in x.gaps) or "none part"
        lines.append(
            f"| {x.method} | {x.equal} of {x.equal + len(x.gaps)} | {x.change:.4f} | {gaps} |"
        )
    return "\n".join(lines) + "\n"


def _run_ranks(num_ranks: int, dtype: str, folder: Path) -> None:
    """Build the ranks with SGLang's one-batch benchmark, its work replaced by ours."""
    from sglang.benchmark import one_batch
    from sglang.srt.plugins import load_plugins

    load_plugins()
    sys.argv = ["one_batch", "--model-path", str(checkpoint("widened")), "--dtype", dtype]
    sys.argv += [
        "--load-format",
        "mixedprec",
        "--mixedprec-config",
        str(folder / f"{METHODS[0]}.yaml"),
    ]
    sys.argv += ["--tp", str(num_ranks), "--enable-fp32-lm-head", "--max-total-tokens", "2048"]
    sys.argv += ["--batch-size", str(len(PROMPTS)), "--correctness-test"]
    one_batch.correctness_test = _generate_everything
    one_batch.cli_main()


def _generate_everything(
    server_args: Any, port_args: Any, _bench_args: Any, gpu_id: int, rank: int
) -> None:
    """One rank: load every method into one model runner, generate, write the steps (rank 0)."""
    from sglang.benchmark import one_batch
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.plugins import load_plugins

    from mixedprec_plugin.serving.loader import MixedPrecisionLoader
    from mixedprec_plugin.serving.settings import read_settings

    load_plugins()
    # as one_batch.correctness_test does, in whose place this runs
    world_rank = one_batch.spawn_world_rank(server_args, tp_rank=rank, pp_rank=0)
    ranks = one_batch.SpawnRanks(world_rank=world_rank, gpu_id=gpu_id)
    one_batch.publish(server_args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    wrapped, tokenizer = one_batch.load_model(server_args, port_args, gpu_id, rank)
    runner = wrapped.torch_runner
    folder = Path(read_settings(server_args).config).parent
    for method in METHODS:
        load_config = dataclasses.replace(
            runner.load_config,
            model_loader_extra_config={"mixedprec_config": str(folder / f"{method}.yaml")},
        )
        runner.model = MixedPrecisionLoader(load_config).load_model(
            model_config=runner.model_config, device_config=DeviceConfig("cpu")
        )
        wrapped.clear()
        steps = _generate(wrapped, tokenizer)
        if rank == 0:
            text = json.dumps(steps)
            (folder / f"{method}.json").write_text(text, encoding="utf-8")


def _generate(wrapped: Any, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """Run all prompts as one batch; for every prompt and step the best tokens and logits."""
    from sglang.benchmark.one_batch import prepare_synthetic_inputs_for_latency_test

    inputs = [tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = prepare_synthetic_inputs_for_latency_test(len(inputs), 0, inputs)
    tokens, logits, batch = wrapped.extend(requests)
    steps = [_best(logits)]
    for _ in range(NUM_TOKENS - 1):
        tokens, logits = wrapped.decode(tokens, batch)
        steps.append(_best(logits))
    return [list(prompt) for prompt in zip(*steps, strict=True)]


def _best(logits: Any) -> list[dict[str, Any]]:
    values, tokens = logits.float().topk(_KEPT)
    return [
        {"tokens": row, "logits": best}
        for row, best in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


_PAGE = """# Tensor parallel

Written by `make tp`: the widened SmolLM2-135M-Instruct on the CPU platform (SGLang {sglang}, torch
{torch}), one method for all linear layers, with one rank and with two; {prompts} prompts, {tokens}
greedy tokens each, fp32 logits (--enable-fp32-lm-head).

- *change of the best logit*: mean difference between one rank and two, over the steps before a
  prompt's tokens part.
- *gaps where they part*: how much better, by one rank's logits, its own token is than the token
  of two ranks, after the same tokens. A gap of the size of the change is a tie that
  rounding decides; a fault in a layer would part at once, by whole logits.

Two ranks cannot give the bits of one: each rounds its part of a row-parallel product to the model's
dtype before SGLang sums them. FP8 per tensor differs by more than rounding: a rank sees half of a
token's row and scales that half by its own maximum, as it does on CUDA.

{tables}"""


if __name__ == "__main__":
    raise SystemExit(main())
