"""Versions: with what something was computed."""

import importlib.metadata
from unittest import mock

from mimogrid.shell.checkpoint.versions import versions


def test_what_is_not_installed_has_no_version() -> None:
    """A checkout on the path of Python computes, and says that it is one."""
    find = importlib.metadata.version

    def version(package: str) -> str:
        if package == "mimogrid":
            raise importlib.metadata.PackageNotFoundError(package)
        return find(package)

    with mock.patch.object(importlib.metadata, "version", version):
        found = versions()
    assert "not installed" == found["mimogrid"]
    assert find("torch") == found["torch"]
