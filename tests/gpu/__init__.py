"""The shipped presets, and single layers, on a real GPU: `make test-gpu`.

run.sh        finds or makes an environment, and starts these tests in it
conftest.py   skips with a reason where there is no GPU; prints the measurements
card.py       whether this machine's GPU can be tested, and which presets it runs
memory.py     one load in a process of its own: bytes on the GPU beside the plan's
speed.py      tokens a second of a running server
serving.py    servers that share a GPU, and how near two of them are
adapters.py   a LoRA adapter, for a server and for the reference
shards.py     what stock SGLang makes of an export's FP8 shards
layers.py     SGLang's layers, loaded through the plugin, with what was stored of them
exact.py, exact_experts.py
              what they are defined to compute, and what kernels' roundings explain
on_cpu.py     the same with the CPU platform's methods
kernels.py    compiles the kernels that the tests of layers reach, ahead of them
"""
