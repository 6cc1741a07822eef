"""Where samples come from: what a source is, those that are built in, and how the one of a job is opened.

May import: the core, `data`, `builders`, `tables`, `textfiles`.
"""
