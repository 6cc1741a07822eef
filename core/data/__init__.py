"""Data: which sample of which store a job trains on, and what an index says of it.

May import: the standard library, attrs and `core.base`.
"""
