"""Units: numbers of bytes as people read them."""

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def in_bytes(size: float) -> str:
    """Write a number of bytes with three digits and the largest unit that it reaches.

    >>> in_bytes(81_920), in_bytes(12)
    ('81.9 kB', '12 B')
    """
    factor, unit = next(((factor, unit) for factor, unit in UNITS if size >= factor), (1, "B"))
    return f"{size / factor:.3g} {unit}"
