"""The measure of parity: what is zero but for rounding is not magnified, and what is wrong is seen at any size."""

import pytest
import torch

from mimogrid.shell.run.parity import ParityReport, compare


NEARLY_ZERO = "tower.key.bias"
WEIGHTS = {"tower.weight": 1e-2, "tower.small": 1e-5, "language.weight": 1e3}
"""The sizes of gradients; those of the language model say nothing of the tower's."""


def gradients() -> dict[str, torch.Tensor]:
    """Gradients of two modules; one of them has no gradient in theory."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: size * torch.randn(64, generator=generator) for name, size in WEIGHTS.items()}
    return drawn | {NEARLY_ZERO: 1e-9 * torch.randn(8, generator=generator)}


def compared(name: str, factor: float, precision: str = "fp32") -> ParityReport:
    """A report of gradients of which one is off by a factor."""
    right = gradients()
    return compare((1.0, 1.0), {**right, name: factor * right[name]}, right, precision=precision)


def test_rounding_of_what_is_zero_in_theory_passes() -> None:
    """The bias of a key, whose gradient is the remains of terms that cancel, may have any sign."""
    report = compared(NEARLY_ZERO, -1)
    assert report.passed
    assert 0 < report.gradients < 1e-6


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("factor", "precision"), [(1.1, "fp32"), (1 + 1e-5, "fp64")])
def test_a_gradient_that_is_scaled_fails(name: str, factor: float, precision: str) -> None:
    """Also a thousandth as large as those beside it."""
    report = compared(name, factor, precision)
    assert not report.passed
    assert name == report.worst[0].parameter


def test_a_module_without_gradients_is_compared_by_all() -> None:
    """A gradient that should not be there fails."""
    report = compare(
        (1.0, 1.0), {"a.weight": torch.ones(2), "b.weight": torch.ones(1)}, {"a.weight": torch.ones(2)},
        precision="fp32",
    )  # fmt: skip
    assert "b.weight" == report.worst[0].parameter
    assert not report.passed
    zero = {"a.weight": torch.ones(2), "b.weight": torch.zeros(1)}
    off = compare((1.0, 1.0), {**zero, "b.weight": torch.full((1,), 1e-3)}, zero, precision="fp32")
    assert off.gradients == pytest.approx(1e-3 * 1.5**0.5)
