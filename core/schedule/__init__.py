"""Actions, and the order in which the stages compute: how many microbatches are in flight, made by one scheduler.

May import: `base` to `pricing`.
"""
