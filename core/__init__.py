"""The functional core: what every rank will do, decided by pure functions over immutable values.

Nothing here imports torch, reads a clock, a file or the environment, or knows which rank it runs on. Functions and values
are pure from outside; inside they may memoize, and a function may build its result step by step.
"""
