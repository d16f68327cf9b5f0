"""The arithmetic that codecs share, in torch.

    codec        what a codec is, and loading one
    integers     codes in groups along K: W = (q - zero) * scale
    scaled       8-bit codes beside scales of tiles
    rounding     group-wise round-to-nearest with an optional clip search
    turns        products with a matrix along the diagonal: rotations
    packing      4- and 8-bit codes in int32 words
    checks       what a weight must be before it is quantized
    chunks       pieces of a weight that fit the cache

Temporary memory is a few MiB whatever the size of the weight.
"""
