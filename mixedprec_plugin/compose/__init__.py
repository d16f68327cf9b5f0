"""Carrying out a plan: the virtual checkpoint, as if someone had written the mixed one to disk."""
