"""Serving a plan with SGLang; the only part of the package that imports it.

plugin     the entry point that SGLang calls in every process
hooks      every place in SGLang that we stand on, and the check that we stand there
flags      --mixedprec-config and its kin on SGLang's command line
settings   the same, as they travel to every rank
config     the composite quantization config: module -> SGLang's own method
source_configs, auto_experts  SGLang's own config of a source, and its experts' method: `auto`
loader     the load format: plan, build, place, check
placement  tensors -> the parameters' own weight loaders, and what was filled
"""
