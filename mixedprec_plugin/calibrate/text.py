"""The text that is calibrated on: written by the model itself, or the user's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from mixedprec_plugin.calibrate.network import Network
from mixedprec_plugin.errors import CheckpointError, Problem, UsageError

# special tokens that documents begin after, beside the tokenizer's own beginning of a text
_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>")


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a checkpoint; a CheckpointError, where that has none or is damaged."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer("a").input_ids
    except Exception as error:  # of every kind: the tokenizers library raises bare ones
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise _no_tokenizer(folder, f"cannot be read ({why:.200})") from error
    if not tokens:
        raise _no_tokenizer(folder, "is missing, or knows no tokens")
    return tokenizer


def _no_tokenizer(folder: Path, what: str) -> CheckpointError:
    remedy = "copy tokenizer.json and tokenizer_config.json of the model's release into the folder"
    return CheckpointError(Problem(str(folder), f"its tokenizer {what}", remedy, "tokenizer"))


def starts(tokenizer: Any) -> list[int]:
    """Tokens that texts of different kinds begin with, each once; a space where none is known.

    Where every text begins alike, that alone: such a model writes nothing sensible without it.
    Else the beginning of a chat or of prose, and of what follows the end of another text: web and
    code.
    """
    if always := tokenizer("").input_ids[:1]:
        return [int(always[0])]
    special = {str(x): n for n, x in tokenizer.added_tokens_decoder.items() if x.special}
    ends = [special[text] for text in _ENDS_OF_TEXT if text in special]
    found = [tokenizer.bos_token_id, *ends[:1], tokenizer.eos_token_id]
    known = list(dict.fromkeys(token for token in found if token is not None))
    return known[:2] or [int(tokenizer(" ", add_special_tokens=False).input_ids[0])]


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one of each row [B, V], int64 [B]; torch.multinomial takes a number for each entry."""
    sums = probabilities.cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, device=sums.device)
    # below the whole sum, however that rounds: what is drawn has a probability
    at = at.mul_(sums[:, -1:]).clamp_(max=sums[:, -1:].nextafter(torch.zeros_like(at)))
    return torch.searchsorted(sums, at, right=True)[:, 0]


class _Drawn(LogitsProcessor):
    """Leaves the one token that is drawn, so that the likeliest is taken."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = draw(scores.softmax(-1), self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


def write_text(
    network: Network, tokenizer: Any, num_windows: int, length: int, seed: int
) -> torch.Tensor:
    """Let a model write windows of text at temperature 1, in turns from each kind of start.

    All of its weights are in memory meanwhile. Returns int64 [num_windows, length].
    """
    kinds = torch.tensor(starts(tokenizer))
    first = kinds[torch.arange(num_windows) % len(kinds)][:, None].to(network.device)
    with contextlib.ExitStack() as stack, torch.no_grad():
        for index in (None, *range(len(network.layers))):
            stack.enter_context(network.loaded(index))
        made = network.model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=False, logits_processor=LogitsProcessorList([_Drawn(seed, network.device)]),
            max_new_tokens=length - 1, min_new_tokens=length - 1, pad_token_id=0,
        )  # fmt: skip
    return torch.as_tensor(made).cpu()


def text_for(
    network: Network, path: Path | None, num_windows: int, length: int, seed: int,
    progress: Progress,
) -> torch.Tensor:  # fmt: skip
    """Windows of a file, at most so many, or of what a model writes where none is named.

    Returns:
        int64 [windows, length].
    Raises:
        CheckpointError, UsageError: as `open_tokenizer` and `read_text`.
    """
    tokenizer = open_tokenizer(network.source.path)
    if path is not None:
        return read_text(path, tokenizer, num_windows, length)
    task = progress.add_task("writing text", total=None)
    made = write_text(network, tokenizer, num_windows, length, seed)
    progress.remove_task(task)
    return made


def read_text(path: Path, tokenizer: Any, num_windows: int, length: int) -> torch.Tensor:
    """Cut a file into windows that begin as the tokenizer begins a text.

    Args:
        num_windows: at most so many, spread over the file.
    Returns:
        int64 [windows, length].
    Raises:
        UsageError: the file cannot be read, or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        remedy = "name a file of plain text in UTF-8"
        raise UsageError(Problem("--text", f"{path} cannot be read: {why}", remedy)) from error
    if not text.strip():
        raise UsageError(Problem("--text", f"{path} is empty", "name a text of prose or code"))
    begin = list(tokenizer("").input_ids)
    size = length - len(begin)
    if size < 1:
        what = f"{length} (expected more than the {len(begin)} tokens that a text begins with)"
        raise UsageError(Problem("--length", what))
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(tokens) < size:
        what = f"{path} is {len(tokens):,} tokens (expected {size:,} or more)"
        raise UsageError(Problem("--text", what, "name a longer text, or give a smaller --length"))
    windows = [begin + tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)]
    if num_windows < len(windows):
        windows = [windows[i * len(windows) // num_windows] for i in range(num_windows)]
    return torch.tensor(windows)


def num_held_out(num_windows: int) -> int:
    """How many of all windows are held out of a calibration: a ninth, one at least of two."""
    return max(num_windows // 9, 1) if num_windows > 1 else 0


def held_last(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Windows [W, L], so many of them from all over the text behind the others."""
    order = torch.arange(len(tokens))
    is_held = order * count // len(tokens) != (order + 1) * count // len(tokens)
    return torch.cat([tokens[~is_held], tokens[is_held]])
