"""The functional core: what every rank will do, decided by pure functions over immutable values.

Nothing here imports torch, reads a clock, a file or the environment, or knows which rank it runs on.
"""
