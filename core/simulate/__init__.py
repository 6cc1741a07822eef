"""Programs with a clock: timelines, memory, bubbles and critical paths, planned or measured.

May import: `base` to `program`.
"""
