"""No whole layer fits: attention reads a cache that no module of a model holds. An attention function of transformers
calls this package's functions.
"""
