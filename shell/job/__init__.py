"""Job files, costs files and model configurations read; the user's modules and sources found.

May import: the core.
"""
