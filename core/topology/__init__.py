"""The parsed job: modules on grids, stages, links, the role of every rank, process groups.

May import: `base`, `job`.
"""
