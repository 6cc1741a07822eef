"""Values that know nothing of jobs: ranks on axes, samples and their shares, hashed draws, problems.

May import: the standard library and attrs.
"""
