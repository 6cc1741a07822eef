"""Adapters: mimogrid inside other frameworks, one file per host."""
