"""The search for the fastest layouts of a job on so many GPUs, and why others lose.

May import: `base` to `simulate`.
"""
