"""Experts of one layer in different schemes.

launch     launch options that do not go with such layers; imports neither torch nor SGLang
groups     which experts run in which scheme
composite  the method of a layer of experts: SGLang's own, or a composite: a child layer for each
           group, ids remapped, outputs summed
loading    tensors of single experts -> the parameters that hold them; whether one is as large as
           what it fills, where no statement of ours says so

What a caller gives, in `get_quant_method(layer, prefix)` for a `FusedMoE` layer:

    groups = [
        ExpertGroup((0, 1, 5), name, label, build_config(name, arguments, device)),
        ExpertGroup((2, 3, 4), unquantized, label),
    ]
    return experts_method(layer, prefix, groups)

- One group for each scheme; its ids are the checkpoint's, and all groups together hold each of
  `range(layer.num_experts)` once. `config` is what `methods.construct.build_config` returns, None
  for unquantized experts.
- One group gives SGLang's own method (None for unquantized, as SGLang expects), of a config that is
  repaired where its method knows a cure. Several give a `CompositeMoEMethod`.
- Gate, up and down projection of an expert share one scheme: SGLang's classes hold no two. Each
  `FusedMoE` has one quantization method; `TritonMoeQuantInfo` (moe_runner/triton.py:52) has one set
  of flags and one block shape, which `_fused_moe_kernel_sequence` (moe_runner/triton_utils/
  fused_moe.py:725, 924) hands to both products; `MarlinMoeQuantInfo` (moe_runner/marlin.py:86) has
  one number of bits. A plan must refuse others; tests/experts/test_sglang.py watches over it.
- Shared experts must not be fused into the routed ones of a composite: answer
  `can_fuse_shared_expert()` of the config with False, and set `disable_shared_experts_fusion`.
- Weights: SGLang's `model.load_weights` works unchanged, as every parameter that some group has
  exists on the layer too, empty, with a loader that forwards. To place a tensor oneself, call
  `load_expert_tensor(layer, expert, "w1", suffix, tensor)`. The children are submodules
  (`experts.expert_groups.0`), so SGLang's loader lets their methods repack the weights.
- At start: refuse what `why_not_composite(server_args, methods)` names where some layer is a
  composite, and what `why_not_experts(server_args, methods)` names where there are experts.
"""
