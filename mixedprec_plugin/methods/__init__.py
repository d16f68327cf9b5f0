"""The quantization methods: what each is called, stores, needs and is run by.

spec.py        what the package knows of a method
registry.py    the table of methods, and binding a name and arguments to it
construct.py   a method's arguments -> SGLang's config object (imports sglang when used)
bf16.py, fp8.py, fp8_channel.py, blockwise_int8.py, awq.py, gptq.py, auto.py    one method each
partitions.py, blocks.py, marlin.py, remedies.py       the shape rules that they share
cards.py       GPUs by name, and what of the methods each cannot run
"""
