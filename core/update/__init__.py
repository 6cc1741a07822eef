"""From gradients to an update: reductions, flat buckets, the decision to take the step, the learning rate.

May import: `base`, `job`, `topology`.
"""
