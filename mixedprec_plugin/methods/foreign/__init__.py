"""Formats that are only read, in the order in which they are asked after the methods' own."""

from mixedprec_plugin.methods.foreign import auto_round, compressed_tensors, named, torchao
from mixedprec_plugin.methods.interface import Format

FOREIGN: tuple[Format, ...] = (
    compressed_tensors.FORMAT,
    torchao.FORMAT,
    named.NAMED,
    named.EIGHT_BITS,
    auto_round.FORMAT,
    named.UNKNOWN_WEIGHT,
)
