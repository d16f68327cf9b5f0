"""Pieces of a weight that are small enough to be worked on in the cache."""

from __future__ import annotations

from collections.abc import Iterator

# A float32 copy of a piece, and one temporary of its size, fit a core's second-level cache.
CHUNK_BYTES = 1 << 20


def row_chunks(num_rows: int, row_length: int, multiple: int = 1) -> Iterator[slice]:
    """Cut rows into slices whose float32 copy takes about `CHUNK_BYTES`.

    Args:
        num_rows: rows of the matrix.
        row_length: elements of a row.
        multiple: every slice but the last starts and ends at a multiple of this many rows.
    Yields:
        Slices that cover 0..num_rows in order, each of at least `multiple` rows (the last may be
        shorter).
    """
    rows = max(CHUNK_BYTES // (4 * max(row_length, 1)) // multiple, 1) * multiple
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def block_chunks(N: int, K: int, block_n: int, block_k: int) -> Iterator[tuple[slice, slice]]:
    """Cut an [N, K] matrix into (rows, columns) slices: one row of blocks by some columns of blocks.

    Args:
        N: rows of the matrix.
        K: columns of the matrix.
        block_n: rows of a block; every slice of rows is one block high, the last may be ragged.
        block_k: columns of a block; every slice of columns but the last is whole blocks wide.
    Yields:
        Slices that cover the matrix, whose float32 copies take about `CHUNK_BYTES` each or, where a
        single block is larger than that, one block.
    """
    columns = list(row_chunks(K, block_n, multiple=block_k))
    for start in range(0, N, block_n):
        for column in columns:
            yield slice(start, min(start + block_n, N)), column
