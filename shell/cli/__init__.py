"""The command line: one file for what is said to each command, and for what it prints.

May import: everything below.
"""
