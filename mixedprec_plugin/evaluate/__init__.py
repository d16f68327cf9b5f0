"""What presets cost: the divergence of their predictions from the unquantized model's.

divergence   models x text -> KL, likelihood and agreement, with standard errors
report       plans -> a table, JSON or a plot
"""
