"""Mixed-precision serving with SGLang: one YAML file decides each layer's quantization method.

    cli           the command `mixedprec`
    serving       SGLang's plugin: load format, loader, quantization config
    experts       experts of one layer in several methods
    search        sources x budget -> the preset of the best quality
    convert       plan x sources -> a checkpoint on disk
    verify        plan x sources x reference -> how far each layer is from it
    evaluate      plans x text -> what each costs in predictions
    calibrate     plan x text -> the codes that cost least
    compose       plan x sources -> the tensors of the mixed checkpoint
    plan          rules x sources x model -> scheme, source and conversion of every layer
    preset        a YAML file -> the ordered rules
    methods       the quantization methods, one folder each, and the formats that are only read
    checkpoint    safetensors headers -> what a source holds
    families      what layer names, config.json and SGLang's class of a model mean
    cpu           SGLang's platform for a plain CPU
    quantize      weight -> the tensors that a method stores, and back: what codecs share
    names         globs over layer names
    resources, errors    the files that ship; the exceptions

Imports point downwards in this list; `lint-imports` holds the code to it. SGLang is imported by
`serving`, `experts`, `cpu`, and of `methods` by `construct`, `marlin_experts` and each `sglang`
module; `cli` asks for it where `doctor` checks it.
"""

__version__ = "0.1.0.dev0"
