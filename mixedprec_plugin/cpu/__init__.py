"""Runs SGLang and every method on a plain CPU.

activate.py        whether the platform is wanted, the entry point of `sglang.srt.platforms`
platform.py        the platform: torch kernels, no Triton, defaults for the server
affinity.py        cores of the machine -> ranks
configs.py         SGLang's quantization configs with CPU linear methods
fp8_linear.py, int8_linear.py, awq_linear.py, gptq_linear.py
                   the linear methods: SGLang's weights and loaders, arithmetic of our own
activation.py      quantization of activations
e4m3.py            FP8 codes -> float32
block_matmul.py    codes x codes with a scale a block
channel_matmul.py  codes x codes with a scale a token and a channel
int4.py, weight_only.py
                   packed integer weights -> weights of the activation's dtype
"""
