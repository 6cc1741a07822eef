"""Everything that each rank does in a step, as a list of actions; how it is replayed, verified and hashed.

May import: `base` to `schedule`.
"""
