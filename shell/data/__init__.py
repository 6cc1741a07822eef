"""People's data: stores of conversations, processors of published checkpoints, and indexes of what comes out.

May import: the core; transformers, Pillow and pyarrow where they are used.
"""
