"""The plan: what every layer runs as, decided from headers before a weight is read.

model         the plan's frozen data
resolve       preset x source -> plan
mixing        what layers of several sources need to be one model:
compatibility   are they checkpoints of one model
biases          a bias just where the model has one
coupling        each norm from the right source, consumers rescaled
pairs           rows that a tool scaled, made up for by another layer's columns
checks        what does not fit
families      what SGLang's class of the model cannot load or run
render        the plan as a table, as JSON, as one screen of log
"""
