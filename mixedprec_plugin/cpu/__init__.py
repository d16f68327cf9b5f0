"""SGLang on a plain CPU: the platform, and the arithmetic that its methods share.

What is one method's own is in `methods/<name>/sglang.py`.

activate.py        whether the platform is wanted, the entry point of `sglang.srt.platforms`
platform.py        the platform: torch kernels, no Triton, defaults for the server
affinity.py        cores of the machine -> ranks
hooks.py           what SGLang's models call that a plain CPU has not
config.py          a config of SGLang's that hands out methods of our own
linear.py          linear layers that quantize activations, the sum over ranks
experts.py         the loop over experts: routing, activation, sum, and what it does not run
packed_layers.py   layers and experts of few bits, which can be loaded again
activation.py      quantization of activations
scaled_matmul.py   codes x codes, with a scale a block, or a token and a channel
packed.py          weights of few bits in the layouts of torch's kernels
heap.py            freed memory back to the system
"""
