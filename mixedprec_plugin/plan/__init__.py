"""The plan: what every layer runs as, decided from headers before a weight is read.

model         the plan's frozen data
resolve       preset x source -> plan, by
  matching      which rule decides which layer
  auto          layers that run as their source stores them
  schemes       the rule that decides -> the layer's scheme, one for a fused module
  heads         `lm_head`, untied and quantized where the preset says so
  kv_cache      the scales of the KV cache, from the source that the preset names
  conversion    stored form and scheme -> what is served
mixing        what layers of several sources need to be one model: biases as the model has them, and
  compatibility   are they checkpoints of one model
  coupling        each norm from the right source, consumers rescaled
  pairs           rows that a tool scaled, made up for by another layer's columns
checks        what does not fit, or loses precision, with
  family_checks   what SGLang's class of the model cannot load or run
  memory          weights that the GPU of a rank does not hold
budget        what the GPU of a rank holds beside weights: SGLang's reserve, the KV cache
folding       names and problems that differ in a layer's number, as one
render        the plan as a table, as JSON, as one screen of log
document      the plan as one JSON document, for the page of `plan --html`, with
  choices       what each kind of layer would become in every method
  overlays      numbers of layers from elsewhere
"""
