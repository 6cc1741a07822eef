"""The network of one stage on one rank, with the parameters of the core's table; `interface` says what it computes.

May import: the core, `device`, `job`, `megatron`, `world`.
"""
