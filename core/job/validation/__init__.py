"""Every reason why a job cannot run: a file for each aspect, and `problems`, which asks all of them.

May import: `base`, and what the spec of a job is made of.
"""
