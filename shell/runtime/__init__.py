"""A step on this rank: stages, transport, gradients, the optimizer, and the loop over the program.

May import: the core, `device` to `modules`.
"""
