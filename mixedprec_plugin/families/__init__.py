"""Model families: what layer names, config.json and SGLang's class of a model mean.

`table` has the families, each a `record` of what differs from what is usual. No file here imports
torch, SGLang, or of this package more than `errors`.
"""
