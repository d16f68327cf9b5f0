"""The preset language: a YAML file with its parents -> the ordered rules."""
