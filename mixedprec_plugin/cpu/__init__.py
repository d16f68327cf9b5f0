"""Runs SGLang and every method on a plain CPU.

activate.py        whether the platform is wanted, the entry point of `sglang.srt.platforms`
platform.py        the platform: torch kernels, no Triton, defaults for the server
affinity.py        cores of the machine -> ranks
configs.py         SGLang's quantization configs with CPU methods
fp8_linear.py, int8_linear.py, awq_linear.py, gptq_linear.py
                   the linear methods: SGLang's weights and loaders, arithmetic of our own
block_linear.py, packed_linear.py
                   what two of them share
fp8_experts.py, int8_experts.py, awq_experts.py, gptq_experts.py, unquantized_experts.py
                   the same for the experts of a layer
experts.py         the loop over experts: routing, activation, sum
expert_checks.py   what the loop does not run
block_experts.py   experts with a scale a block
packed_experts.py  experts of few bits
rows.py            tokens flattened, bias added
activation.py      quantization of activations
e4m3.py            FP8 codes -> float16
precision.py       exact float32 matmuls on bfloat16 units
block_matmul.py    codes x codes with a scale a block
channel_matmul.py  codes x codes with a scale a token and a channel
weight_only.py     packed weights -> weights of the activation's dtype
int4.py, int8.py   weight-only weights in the layouts of torch's kernels
"""
