"""Everything that each rank does in a step, as a list of actions; its replay, proof and digest.

May import: `base` to `schedule`.
"""
