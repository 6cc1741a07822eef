"""Reads job files, costs files and model configurations, and finds the user's own modules and sources.

May import: the core, `data`.
"""
