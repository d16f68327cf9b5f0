"""What the compressed-tensors library makes of our exports, in an environment of its own.

check.py        python -m benchmarks.compressed_tensors.check: export, decompress there, compare
decompress.py   the part that runs there
export.yaml     every method that can be exported
"""
