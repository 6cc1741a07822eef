"""Orders of the compute actions of a step, all made by one list scheduler.

May import: `base` to `pricing`.
"""
