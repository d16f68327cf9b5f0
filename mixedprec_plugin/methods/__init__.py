"""The quantization methods, one folder each.

<name>/        a method: its facts in `__init__`, which need no torch; the arithmetic of storing it
               in `codec`; what SGLang needs of it in `sglang`
foreign/       formats that are only read, of the same shape
interface      what a method is
registry       the table of methods, and the binding of a name and arguments to one of them
stored         how one layer is stored, and what config.json says of it
recognition    a layer's tensors and config.json -> how it is stored, by asking every format
remedies       why a layer is not served, and what was tried instead
construct      a method's arguments -> SGLang's config object (imports sglang when used)
shapes, integers, scaled    the rules and layouts that several methods share
cards          GPUs by name
"""
