"""Timelines, planned or measured, and layouts: as text for a terminal, as SVG, as a trace for Perfetto.

May import: `base` to `simulate`.
"""
