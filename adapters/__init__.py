"""Adapters: mimogrid inside other training programs, one file or package for each framework."""
