"""Published checkpoints, as values: what a ``config.json`` says a job is, and where its parameters lie on disk.

A family is a file here. `families.read_config` finds the one that a config belongs to.
May import: the standard library, attrs and `core.base`.
"""
