"""Draw: timelines and layouts as text for a terminal, SVG for a page, a trace for Perfetto.

A timeline is a `Timeline`, whoever made it: a simulated step and a measured one (`measured`) are drawn alike.
"""
