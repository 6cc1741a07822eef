"""Draw: timelines and layouts as text for a terminal, SVG for a page, a trace for Perfetto.

A simulated step and a measured one (`measured`) are both a `Timeline`, and are drawn alike.
"""
