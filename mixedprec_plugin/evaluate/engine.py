"""Teacher-forced distributions over the whole vocabulary out of a running SGLang server."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np

from mixedprec_plugin.errors import MixedPrecisionError
from mixedprec_plugin.evaluate.server import Server

WINDOW = 128


class AlignmentError(MixedPrecisionError):
    """The server's rows are not the positions that were asked for."""


def distributions(
    server: Server, tokens: list[int], vocabulary_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Ask the server for the log-probabilities of every token of the vocabulary, in windows.

    The server returns the top k of each position; k is the vocabulary, so nothing is cut off. A
    window's request repeats all tokens before it, which the server has in its prefix cache.

    Args:
        tokens: T token ids, sent as they are.
        vocabulary_size: V.
    Yields:
        (first, rows): log-probabilities float32 [n, V]; rows[i] is the distribution of token
        first + i given the ones before it. Together they cover tokens 1 to T - 1.
    Raises:
        AlignmentError: a row does not hold the log-probability that the server itself reports for
            the token that follows.
    """
    for start in range(0, len(tokens) - 1, WINDOW):
        end = min(start + WINDOW + 1, len(tokens))
        answer = server.request("/generate", _request(tokens[:end], start, vocabulary_size))
        rows = _rows(answer["meta_info"], vocabulary_size)
        _check_alignment(rows, answer["meta_info"], tokens[start + 1 : end])
        yield start + 1, rows


def _request(tokens: list[int], start: int, vocabulary_size: int) -> dict[str, Any]:
    return {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": start,
        "top_logprobs_num": vocabulary_size,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_output_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }


def _rows(meta: dict[str, Any], vocabulary_size: int) -> np.ndarray:
    """Decode the sorted (value, token id) rows and put each value at its token's place."""
    shape = meta["input_top_logprobs_shape"]
    values = _decode(meta, "input_top_logprobs_val_flat_b64", shape)
    indices = _decode(meta, "input_top_logprobs_idx_flat_b64", shape)
    if shape[1] != vocabulary_size:
        raise AlignmentError(f"{shape[1]} log-probabilities a row (expected {vocabulary_size})")
    rows = np.full(shape, np.nan, dtype=np.float32)
    np.put_along_axis(rows, indices.astype(np.int64), values, axis=1)
    if np.isnan(rows).any():
        raise AlignmentError("a row lacks a token of the vocabulary, or holds NaN")
    return rows


def _decode(meta: dict[str, Any], key: str, shape: list[int]) -> np.ndarray:
    data = base64.b64decode(meta[key])
    return np.frombuffer(data, dtype=meta[f"{key}_dtype"]).reshape(shape)


def _check_alignment(rows: np.ndarray, meta: dict[str, Any], targets: list[int]) -> None:
    reported = [entry for entry in meta["input_token_logprobs"] if entry[0] is not None]
    # SGLang reports the last id of the vocabulary as 0 (managers/scheduler_components/
    # logprob_result_processor.py:54 in 0.5.23)
    last = rows.shape[1] - 1
    expected = [token if token < last else 0 for token in targets]
    if [entry[1] for entry in reported] != expected or len(rows) != len(targets):
        raise AlignmentError(
            f"{len(rows)} rows and {len(reported)} tokens came back (expected {len(targets)})"
        )
    chosen = rows[np.arange(len(targets)), targets]
    if not np.allclose(chosen, [entry[0] for entry in reported], atol=1e-4):
        raise AlignmentError("rows and the log-probabilities of the tokens differ")
