"""Finding the preset: the best quality for a budget of memory.

candidates   methods, arguments and sources -> what each unit of a model could run as
scores       what each of these costs: one sweep over the model
gathered     the same of what a serving engine's layers read
measured     the same of what a serving engine predicts
kept         scores beside the checkpoint, for the next search
rule         a rule of thumb in their place, from shapes alone
allocate     scores x budget -> the candidate of every unit
write        an assignment -> a preset that a person can read
finder       all of it, every budget at once, and where other presets stand
report       what was found, for people
"""
