"""The shell: everything that touches the world. It opens, moves, runs and closes what the core planned."""
