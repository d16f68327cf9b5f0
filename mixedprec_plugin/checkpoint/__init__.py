"""Reading checkpoints.

headers   one safetensors file: names, dtypes, shapes, byte ranges, without torch
source    a folder: index, config.json, layers and the tensors they own
formats   the format that a layer is stored in, told from its tensors, held against config.json
reader    bytes -> torch tensors
"""
