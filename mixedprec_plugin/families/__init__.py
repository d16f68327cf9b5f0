"""Model families: what layer names, config.json and SGLang's class of a model mean.

record   all that is known of a family, as fields, with what is usual as their defaults
table    the families, one record an architecture or its close kin; `family_of` a config.json
parts    what goes together in a module of a model
config   what config.json says, wherever it says it
names    facts of a layer name: its kind, its fused module, how ranks split it
wiring   which layers read a norm, or another layer's outputs

No file here imports torch, SGLang, or of this package more than `errors`.
"""
