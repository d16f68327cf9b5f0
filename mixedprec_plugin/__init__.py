"""Mixed-precision serving with SGLang: one YAML file decides each layer's quantization method.

    errors        the exceptions, and the problems that they carry
    names         globs over layer names
    resources     the schemas and presets that ship
    preset        a YAML file -> the ordered rules
    methods       the registry of quantization methods
    families      what layer names, config.json and SGLang's class of a model mean
    checkpoint    safetensors headers -> what a source holds, and how it stores it
    plan          rules x sources x model -> scheme, source and action of every layer
    quantize      weight -> the tensors that a method stores, and back
    compose       plan x sources -> the tensors of the mixed checkpoint
    serving       SGLang's plugin: load format, loader, quantization config
    cpu           SGLang's platform: the same methods on a plain CPU
    cli           the command `mixedprec`

Imports point downwards in this list's reverse: only `serving` and `cpu` import SGLang.
"""

__version__ = "0.1.0.dev0"
