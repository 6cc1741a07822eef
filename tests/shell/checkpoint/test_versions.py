"""Versions: what computed something, and how that differs when a run resumes."""

import importlib.metadata
from unittest import mock

import torch

from mimogrid.shell.checkpoint.versions import differences, machine, versions


CPU = torch.device("cpu")


def test_what_is_not_installed_has_no_version() -> None:
    """A checkout on the path of Python computes without being installed, and this is what it says."""
    find = importlib.metadata.version

    def version(package: str) -> str:
        if package == "mimogrid":
            raise importlib.metadata.PackageNotFoundError(package)
        return find(package)

    with mock.patch.object(importlib.metadata, "version", version):
        found = versions()
    assert "not installed" == found["mimogrid"]
    assert find("torch") == found["torch"]


def test_another_machine_or_torch_is_named() -> None:
    """Each difference has both values; a manifest without a machine, of an older version, differs in nothing."""
    here = {"machine": machine(CPU), "versions": versions()}
    assert [] == differences(here, CPU) == differences({}, CPU)
    there = {"machine": {**here["machine"], "kernels": "OTHER"}, "versions": {"torch": "1.0"}}
    kernels, of_torch = differences(there, CPU)
    assert f"kernels {machine(CPU)['kernels']} instead of OTHER" == kernels
    assert f"torch {versions()['torch']} instead of 1.0" == of_torch
