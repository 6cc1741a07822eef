"""The functional core: pure functions over immutable values that decide what every rank will do.

Nothing here imports torch, reads a clock, a file or the environment, or knows its own rank. A value may memoize what it
computes, and functions may cache results; callers cannot see either.
"""
