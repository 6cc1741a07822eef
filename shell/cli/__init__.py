"""The command line: arguments, one file for each larger command, and what they print.

May import: everything below.
"""
