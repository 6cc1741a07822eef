"""The job that the user wrote, as values: modules and their options, the graph, costs, and validation.

May import: `base`.
"""
