"""Units: numbers for people, with the unit that fits."""

BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def in_bytes(count: float) -> str:
    """Write a number of bytes with three digits and a decimal unit.

    >>> in_bytes(81_920), in_bytes(12), in_bytes(2_500_000_000)
    ('81.9 kB', '12 B', '2.5 GB')
    """
    factor, unit = next(((factor, unit) for factor, unit in BYTES if count >= factor), (1, "B"))
    return f"{count / factor:.3g} {unit}"
