"""A training run and what it writes; parity, probing and evaluation, which run the same program.

May import: the core, `device` to `checkpoint`.
"""
