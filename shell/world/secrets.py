"""Secrets: what must not stand in a log or in a report.

The environment of a process may hold tokens of services. Their values may get into errors, as part of an address.
"""

import json
import os
import re


SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
"""What the names of variables contain whose values are secret."""
SHORTEST = 6
"""A shorter value is a setting, such as 1 or false, and would be found in other words."""


def without_secrets(text: str) -> str:
    """Return a text with the name of the variable in place of every value that is secret.

    >>> os.environ["EXAMPLE_TOKEN"] = "hunter-2"
    >>> without_secrets("403 for https://me:hunter-2@example.org")
    '403 for https://me:$EXAMPLE_TOKEN@example.org'
    """
    for value, name in sorted(_secrets().items(), key=lambda item: -len(item[0])):
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, f"${name}")
    return text


def _secrets() -> dict[str, str]:
    """Return the names of secret variables by value."""
    found = os.environ.items()
    return {value: name for name, value in found if SECRET.search(name) and len(value) >= SHORTEST}
