"""Progress: the metrics of a step in words, for the console and for those who watch."""

from collections.abc import Mapping
from typing import Any

from mimogrid.core.base.units import in_bytes


DATA_SHOWN = 0.005
"""The least share of waiting for data that people are shown."""


def progress_text(facts: Mapping[str, Any]) -> str:
    """Return the metrics of a step for people; what is not known is left out.

    >>> progress_text({"loss": 0.5, "losses": {"lm": 0.5}, "step_s": 0.08, "tokens_per_s": 12000.0, "waiting": 0.25})
    'loss 0.5000  80 ms a step  12,000 tokens/s  waiting 25 %'
    """
    parts = [f"loss {facts['loss']:.4f}"]
    if len(facts["losses"]) > 1:
        parts.append("(" + ", ".join(f"{name} {loss:.4f}" for name, loss in facts["losses"].items()) + ")")
    if facts.get("step_s") is not None:
        parts.append(f"{in_seconds(facts['step_s'])} a step")
    for key, unit in (("samples_per_s", "samples/s"), ("tokens_per_s", "tokens/s")):
        if facts.get(key):
            parts.append(f"{facts[key]:,.0f} {unit}")
    for key, name in (("mfu", "MFU"), ("waiting", "waiting")):
        if facts.get(key) is not None:
            parts.append(f"{name} {100 * facts[key]:.0f} %")
    if (facts.get("waiting_for_data") or 0) >= DATA_SHOWN:
        parts[-1] += f" (data {100 * facts['waiting_for_data']:.0f} %)"
    if facts.get("peak_bytes"):
        parts.append(f"peak {in_bytes(facts['peak_bytes'])}")
    return "  ".join(parts)


def in_seconds(seconds: float) -> str:
    """Return a time with two digits or more, as ms below a second.

    >>> in_seconds(0.0804), in_seconds(2.5)
    ('80 ms', '2.50 s')
    """
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
