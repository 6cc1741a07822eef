"""Processes that meet, make the planned groups, and end together with one report.

May import: the core, `device`, `job`.
"""
