"""Reading checkpoints.

files     plain files within bounds, JSON and links
records   config.json held against its schema
patterns  its regular expressions, matched in bounded time
headers   one safetensors file: names, dtypes, shapes, bytes, without torch
source    a folder: index, config.json, layers and the tensors they own
formats   the format that a layer is stored in, told from its tensors, held against config.json
values    small tensors for planning, without torch
recorded  what `mixedprec convert` recorded of its files, and whether they are still that
reader    torch tensors, through the safetensors library
hub       the same files on the Hugging Face Hub
"""
