"""Experts of one layer in different schemes."""
