"""A fuzzer of the command line: `make fuzz`, and a few seconds of it in the tests.

Valid folders (`seeds`) are changed by structure (`mutations`) and given to the verbs in this
process (`case`). An input that leads to words not seen before is kept and changed further
(`campaign`). Every outcome is success or an error of our own; anything else is a finding, written
as a file that belongs into `corpus` once it is mended.
"""
