"""The graph of what happens in a step: pieces of time, each behind others, for actions, messages and all-reduces.

May import: timelines, rank classes and the lower bound of `simulate`, and what `simulate` may.
"""
