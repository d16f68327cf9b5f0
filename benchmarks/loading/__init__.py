"""How long loading takes, held against SGLang's own loader.

models    the checkpoints: real and random ones, in several parts, twice
cache     the page cache: put files out of it, and see that they are
loads     one process that loads with both loaders, in turn
report    the page
"""
