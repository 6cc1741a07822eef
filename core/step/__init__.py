"""The samples of one step laid over a topology: counts, shapes, and who sends which rows to whom.

May import: `base`, `job`, `topology`.
"""
