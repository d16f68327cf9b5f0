"""Unsigned codes in int32 words, as GPTQ, AWQ and humming checkpoints store them.

A word holds 32 / bits codes, and where that is no whole number a code may lie in two words. Four
layouts are in use:

    along K, low bits first       humming `weight` [N, K*bits/32]
    the same, transposed          GPTQ `qweight` [K/pf, N]
    along N, low bits first       GPTQ `qzeros` [K/G, N/pf]
    along N, interleaved          AWQ `qweight` [K, N/8] and `qzeros` [K/G, N/8]: nibble i of a
                                  word, from the low end, holds column `AWQ_ORDER[i]` of its eight

Words are read and written as bytes where that is faster, which takes a little-endian machine: all
that torch runs on are.
Source: AutoGPTQ `QuantLinear.pack`, AutoAWQ `WQLinear_GEMM.from_linear`, humming-kernels
`common_pack_weight` (include/humming/kernel/pack_weight.cuh).
"""

from __future__ import annotations

import torch

from mixedprec_plugin.quantize.chunks import is_compiled

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_PACK_FACTOR = 8


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """Lay a tensor out so that bytes are views of words; `contiguous` skips dimensions of one."""
    if 1 in tensor.shape:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous()


def pack(codes: torch.Tensor, bits: int, num_weights: int = 0) -> torch.Tensor:
    """Pack codes along the last dimension, low bits first.

    Args:
        codes: uint8 [..., n], each below 2**bits, in whole words; not modified.
        bits: 2 to 8.
        num_weights: of the whole weight, if codes [R, K] are a part of one.
    Returns:
        int32 [..., n * bits / 32], contiguous.
    """
    codes = _in_a_row(codes)
    if bits not in (4, 8) and is_compiled(codes, num_weights):
        from mixedprec_plugin.quantize import compiled_packing

        words = torch.empty((len(codes), codes.shape[1] * bits // 32), dtype=torch.int32)
        compiled_packing.pack_rows(codes, bits, words)
        return words
    if bits == 8:
        return codes.view(torch.int32)
    if bits != 4:
        # eight codes are as many bytes as a code has bits
        octets = codes.new_zeros(bits, *codes.shape[:-1], codes.shape[-1] // 8)
        for i in range(8):
            first, shift = divmod(bits * i, 8)
            octets[first] |= codes[..., i::8] << shift
            if shift + bits > 8:
                octets[first + 1] |= codes[..., i::8] >> (8 - shift)
        return torch.stack(octets.unbind(), -1).flatten(-2).view(torch.int32)
    # Two codes, one a byte, read as a 16-bit word: the high byte's low nibble moves down by four.
    pairs = codes.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor, bits: int, num_weights: int = 0) -> torch.Tensor:
    """Undo `pack`: int32 [..., n] to uint8 [..., n * 32 / bits], contiguous."""
    octets = _in_a_row(words).view(torch.uint8)
    if bits not in (4, 8) and is_compiled(octets, num_weights):
        from mixedprec_plugin.quantize import compiled_packing

        codes = torch.empty((len(words), words.shape[1] * 32 // bits), dtype=torch.uint8)
        compiled_packing.unpack_rows(words.contiguous(), bits, codes)
        return codes
    if bits == 8:
        return octets
    if bits != 4:
        octets = octets.view(*octets.shape[:-1], -1, bits).movedim(-1, 0).contiguous()
        lanes = []
        for i in range(8):
            first, shift = divmod(bits * i, 8)
            lane = octets[first] >> shift
            if shift + bits > 8:
                lane |= octets[first + 1] << (8 - shift)
            lanes.append(lane.bitwise_and_((1 << bits) - 1))
        return torch.stack(lanes, -1).flatten(-2)
    codes = torch.empty((*octets.shape, 2), dtype=torch.uint8, device=words.device)
    torch.bitwise_and(octets, 15, out=codes[..., 0])
    torch.bitwise_right_shift(octets, 4, out=codes[..., 1])
    return codes.flatten(-2)


def unpack_along_k(words: torch.Tensor, rows: slice, bits: int) -> torch.Tensor:
    """Undo `pack`, to uint8 [rows, K], where words [K * bits / 32, N] are transposed."""
    codes = _compiled_columns(words, rows, bits, along_k=True)
    return unpack(words[:, rows].t(), bits) if codes is None else codes


def _compiled_columns(
    words: torch.Tensor, rows: slice, bits: int, *, along_k: bool
) -> torch.Tensor | None:
    """What compiled loops unpack; None where they do not work on such words."""
    num_weights = words.numel() * 32 // bits
    if not (words.is_contiguous() and is_compiled(words.view(torch.uint8), num_weights)):
        return None
    from mixedprec_plugin.quantize.compiled_packing import unpack_columns

    K, first = (len(words) * 32 // bits, rows.start) if along_k else (len(words), rows.start // 8)
    codes = torch.empty((rows.stop - rows.start, K), dtype=torch.uint8)
    unpack_columns(words, bits, first, codes, along_k=along_k)
    return codes


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes along N, interleaved, from [N, K] to AWQ's [K, N/8].

    Args:
        codes: uint8 [N, K], each below 16; N is a multiple of 8; not modified.
    Returns:
        int32 [K, N/8]; a transposed view.
    """
    N, K = codes.shape
    columns = codes.view(N // AWQ_PACK_FACTOR, AWQ_PACK_FACTOR, K)
    octets = [
        columns[:, low] | (columns[:, high] << 4)
        for low, high in zip(AWQ_ORDER[0::2], AWQ_ORDER[1::2], strict=True)
    ]
    return torch.stack(octets, dim=-1).view(torch.int32).squeeze(-1).t()


def unpack_awq_rows(words: torch.Tensor, rows: slice) -> torch.Tensor:
    """Undo `pack_awq` for some rows, from and to a multiple of 8: uint8 [rows, K]."""
    codes = _compiled_columns(words, rows, 4, along_k=False)
    if codes is not None:
        return codes
    return unpack_awq(words[:, rows.start // AWQ_PACK_FACTOR : rows.stop // AWQ_PACK_FACTOR])


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Undo `pack_awq`: int32 [K, N/8] to uint8 [N, K], contiguous."""
    K, num_words = words.shape
    octets = _in_a_row(words.t()).view(torch.uint8).view(num_words, K, 4)
    codes = torch.empty((num_words, AWQ_PACK_FACTOR, K), dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(AWQ_ORDER):
        octet = octets[..., nibble // 2]
        codes[:, column] = (octet >> 4) if nibble % 2 else (octet & 15)
    return codes.flatten(0, 1)
