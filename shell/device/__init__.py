"""The device of this process: cuda and NCCL, or cpu and gloo; its streams; this process's rank.

May import: the core.
"""
