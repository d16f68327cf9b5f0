"""The format that a layer is stored in: told from its tensors, held against config.json.

detect     the one entry: a layer's tensors and `quantization_config` -> `StoredFormat`
stored     `StoredFormat` itself
promise    what `quantization_config` says of one layer, ignore lists and overrides applied
packed     AWQ and GPTQ: `qweight`, `qzeros`, `scales`
scaled     8-bit weights beside a scale: FP8 and INT8, per tensor, channel, group and block
compressed compressed-tensors' pack-quantized
torchao    torchao's flattened tensor subclasses
foreign    formats that are known by name only

Headers are all that is read. Tensors decide: the whole-checkpoint `quantization_config` may name a
method that one layer is not stored in, or leave out one that it is. The config only says what
headers cannot (block sizes of ragged grids, GPTQ's zero convention, the direction of a scale);
where the two contradict each other, the format says so in its `disagreements`.
"""

from mixedprec_plugin.checkpoint.formats.detect import FormatCache, detect_format
from mixedprec_plugin.checkpoint.formats.stored import StoredFormat

__all__ = ["FormatCache", "StoredFormat", "detect_format"]
