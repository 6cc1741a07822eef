"""Why a run failed or is slow, from what each rank was last seen doing.

May import: `base` to `program`.
"""
