"""The plan: what every layer runs as, decided from headers before a weight is read.

model         the plan's frozen data
preset        the preset to plan with
resolve       preset x source -> plan, by
  matching      which rule decides which layer
  schemes       the rule that decides -> the layer's scheme
  auto          layers that run as their source stores them
  fusion        one scheme for all shards of a fused module
  heads         `lm_head`, untied and quantized where the preset says so
  kv_cache      the scales of the KV cache, from the source that the preset names
  conversion    stored form and scheme -> what is served
mixing        what layers of several sources need to be one model:
  compatibility   are they checkpoints of one model
  biases          a bias just where the model has one
  coupling        each norm from the right source, consumers rescaled
  pairs           rows that a tool scaled, made up for by another layer's columns
checks        what does not fit, with
  family_checks   what SGLang's class of the model cannot load or run
  losses          what is lost by a second rounding
  memory          weights that the GPU of a rank does not hold
budget        what the GPU of a rank holds beside weights: SGLang's reserve, the KV cache
folding       names and problems that differ in a layer's number, as one
render        the plan as a table, as JSON, as one screen of log
document      the plan as one JSON document, for the page of `plan --html`, with
  choices       what each kind of layer would become in every method
  overlays      numbers of layers from elsewhere
"""
