"""The plan: what every layer runs as, decided from headers before a weight is read.

architecture  what kind of layer a name is, which fused module it is a shard of
model         the plan's frozen data
resolve       preset x source -> plan
checks        what does not fit
render        the plan as a table, as JSON, as one screen of log
"""
