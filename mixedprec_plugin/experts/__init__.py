"""Experts of one layer in different schemes.

launch     launch options that do not go with such layers; imports neither torch nor SGLang
groups     which experts run in which scheme
composite  the method of a layer of experts: SGLang's own, or a composite: a child layer for each
           group, ids remapped, outputs summed
loading    tensors of single experts -> the parameters that hold them; whether one is as large as
           what it fills, where no statement of ours says so

Gate, up and down projection of an expert share one scheme: SGLang's classes hold no two. Each
`FusedMoE` has one quantization method; `TritonMoeQuantInfo` (moe_runner/triton.py:52) has one set
of flags and one block shape, which `_fused_moe_kernel_sequence` (moe_runner/triton_utils/
fused_moe.py:725, 924) hands to both products; `MarlinMoeQuantInfo` (moe_runner/marlin.py:86) has
one number of bits. A plan refuses others; tests/experts/test_sglang.py watches over it.
"""
