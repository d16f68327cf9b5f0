"""Rounding by what a layer's inputs and outputs are worth to the model's predictions.

network      transformers' class of the model, a decoder layer in memory at a time
text         what is calibrated on: the model writes it, or the user names a file
capture      each layer's inputs, and how much its outputs matter
ranks        several processes, each with some windows and some layers
moments      both as one matrix, H
sweep        forward and backward over the whole model, kept on disk
rounding     one layer: H and its weight -> codes
folds        where scales can be folded between layers
folded       rounding with these
calibrator   all of it: a plan -> the codes of its layers
"""

# of text, where nobody says how much: pieces, and tokens of one
WINDOWS = 112
LENGTH = 128
