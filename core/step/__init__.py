"""The samples of one step on a topology: counts, shapes, and who sends which rows to whom.

May import: `base`, `job`, `topology`.
"""
