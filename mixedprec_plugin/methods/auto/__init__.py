"""Method `auto`: the layer runs as its source stores it, whatever that is.

On CUDA by SGLang's own class for the source's `quantization_config`, which takes every tensor as it
is stored: whatever SGLang reads can be mixed in. It has no arguments: the source decides. What a
layer becomes is in `plan.auto`.
"""

from __future__ import annotations

from mixedprec_plugin.methods.interface import Method, Rounding

METHOD = Method(
    name="auto",
    title="as the source stores it, by SGLang's own class for its quantization_config",
    description="The layer runs as its source stores it, by the source's own quantization_config; "
    "the source decides everything, so there are no arguments.",
    aliases={},
    schema={},
    stored=lambda _arguments, _N, _K, _dtype: {},
    declare=lambda _arguments: {},
    # SGLang's class says what it refuses when it builds the layer
    faults=lambda _arguments, _shape, _target: [],
    # never compared: shards under `auto` are of one format, or an error
    rounding=lambda _arguments: Rounding(rank=0.0, limit=0.05),
    searched=(),
)
