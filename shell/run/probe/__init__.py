"""Probe: what the stages and edges of a job cost on this machine, measured in the world of the job.

May import: what `run` may.
"""
