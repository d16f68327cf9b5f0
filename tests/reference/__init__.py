"""Implementations that share no code with the package, to compare it with."""
