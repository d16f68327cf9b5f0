"""Finding the preset: the best quality for a budget of memory.

candidates   methods, arguments and sources -> what each unit of a model could run as
scores       what each of these costs: one sweep over the model
kept         scores beside the checkpoint, for the next search
rule         a rule of thumb in their place, from shapes alone
allocate     scores x budget -> the candidate of every unit
front        every budget at once, and where other presets stand
write        an assignment -> a preset that a person can read
search       all of it
"""
