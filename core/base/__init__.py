"""Values that know nothing about jobs: grids of ranks, samples and their shares, hashed draws, problems.

May import: the standard library and attrs.
"""
