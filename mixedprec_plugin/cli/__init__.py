"""The console script `mixedprec`: one verb a file."""
