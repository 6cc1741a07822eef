"""What the user wrote, as values: modules and their options, the graph, costs, and every reason to refuse it.

May import: `base`.
"""
