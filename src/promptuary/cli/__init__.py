"""The command line: one file per verb, each of which parses, calls the library and prints.

Knows no tensors; importing it loads neither torch nor transformers.
"""
