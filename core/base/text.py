"""Text: what comes from files, made harmless where people read it."""


def printable(text: str) -> str:
    r"""Return a text in which control characters, escapes of terminals and marks of direction are written out.

    Line breaks and tabs stay.

    >>> printable("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
