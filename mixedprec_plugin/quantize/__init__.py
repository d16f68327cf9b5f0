"""Pure functions between a weight and the tensors that a quantization method stores.

    fp8, fp8_channel, blockwise_int8,
    awq, gptq                        one module a method: `quantize` and `dequantize`
    scaled, pack_quantized           `dequantize` for what other tools store
    gptq_stored                      what kernels take for granted of a stored GPTQ layer
    blocks                           one scale for each [block_n, block_k] tile of a weight
    rounding                         group-wise round-to-nearest with an optional clip search
    packing                          4- and 8-bit codes in int32 words
    checks                           what a weight must be before it is quantized
    chunks                           pieces of a weight that fit the cache

Each `quantize(weight, arguments, dtype)` returns a new dict (tensor suffix -> tensor) and leaves
the weight as it is. Temporary memory is a few MiB whatever the size of the weight.
"""
