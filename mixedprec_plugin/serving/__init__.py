"""Serving a plan with SGLang.

plugin          the entry point that SGLang calls in every process
hooks           every place in SGLang that we stand on, and the check that we stand there
flags           --mixedprec-config and its kin on SGLang's command line
settings        the same, as they travel to every rank
early, options  what is refused before a process is started or a weight is read
planner         the plans of a start, each made once a process
config          the composite quantization config: module -> SGLang's own method
source_configs  SGLang's own config of a source, and its experts' method: `auto`
late            what the plan cannot know: what SGLang's classes say, chose or built
stages          the part of a model that one pipeline stage builds
loader          the load format: plan, build, place, check
progress        how far a load is
filling, placement  tensors -> the parameters' own weight loaders, and what was filled
"""
