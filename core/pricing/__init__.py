"""FLOPs, bytes, and the costs of a job that nobody has measured.

May import: `base` to `update`.
"""
