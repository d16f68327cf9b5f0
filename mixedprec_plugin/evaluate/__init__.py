"""What presets cost: the divergence of their predictions from the unquantized model's.

server       `sglang serve` on the loopback interface
engine       a running server -> its distributions over the whole vocabulary
divergence   models x text -> KL, likelihood and agreement, with standard errors
report       plans -> a table, JSON or a plot
"""
