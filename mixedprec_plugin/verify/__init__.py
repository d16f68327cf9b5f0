"""Is what a plan composes still the model? Every layer, dequantized, against a reference.

thresholds   how far from its reference a layer may be, by what it is stored and served as
distance     relative error and cosine of two weights
verifier     one layer at a time, scales that were folded into a neighbour taken out
report       all of them, worst first
"""
