"""Adapters: mimogrid inside other frameworks, one file or package per host."""
