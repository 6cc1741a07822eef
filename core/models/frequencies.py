"""Rotary frequencies: by which angle each pair of a head's values turns per position.

A head of width d has d / 2 pairs: value j is turned with value j + d / 2. Pair j turns by
``position * frequencies[j]``, and cosines and sines are multiplied by an attention factor, which only YaRN
sets. `scaling` stretches the frequencies for longer contexts than a model was first trained for.

>>> frequencies(4, 10_000.0)
(1.0, 0.01)

Two-dimensional positions (rows and columns of an image) give each axis half of the pairs:
``frequencies(d // 2, base)`` for the rows, and the same again for the columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from mimogrid.core.base.errors import PlanError, Problem, nearest


@attrs.frozen(kw_only=True)
class LinearScaling:
    """All positions divided by `factor`."""

    factor: float

    attention_factor = 1.0

    def scaled(self, frequency: float, pair: int, pairs: int, base: float) -> float:
        """Return the frequency of a pair."""
        return frequency / self.factor


@attrs.frozen(kw_only=True)
class Llama3:
    """Long wavelengths divided by `factor`, short ones kept, those in between blended.

    A wavelength is long if fewer than `low_freq_factor` of it fit into the original context, and short if
    more than `high_freq_factor` do.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    attention_factor = 1.0

    def scaled(self, frequency: float, pair: int, pairs: int, base: float) -> float:
        """Return the frequency of a pair."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor or 1e-9)
        kept = min(max(kept, 0.0), 1.0)
        return (1 - kept) * frequency / self.factor + kept * frequency


@attrs.frozen(kw_only=True)
class Yarn:
    """YaRN: pairs that turn often are kept, slow ones divided by `factor`, and cosines and sines grow.

    The ramp between kept and divided runs over pairs, from the one that turns `beta_fast` times in the
    original context to the one that turns `beta_slow` times; `truncate` rounds both ends outwards.
    """

    factor: float
    original_max_position_embeddings: float
    given_attention_factor: float | None = attrs.field(default=None, alias="attention_factor")
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def scaled(self, frequency: float, pair: int, pairs: int, base: float) -> float:
        """Return the frequency of a pair."""
        first, last = (self._pair(turns, pairs, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The published code bounds the ramp by the head's width, twice the pairs.
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        divided = min(max((pair - first) / (last - first or 0.001), 0.0), 1.0)
        return divided * frequency / self.factor + (1 - divided) * frequency

    def _pair(self, turns: float, pairs: int, base: float) -> float:
        """Return which pair turns so many times in the original context; it need not be a whole number."""
        return (
            pairs * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(base)
        )


Scaling = LinearScaling | Llama3 | Yarn

SCALINGS: Mapping[str, type[Scaling]] = {"linear": LinearScaling, "llama3": Llama3, "yarn": Yarn}
"""The scalings by the name that checkpoints give them (`rope_type`); their fields have the checkpoints' names."""


def parse_scaling(where: str, options: Mapping[str, object]) -> Scaling:
    """Return the scaling that a table of options describes: `type` and the fields of that type.

    Raises:
        PlanError: The type or an option is unknown, an option is missing, or is no number.

    >>> parse_scaling("modules.language.rotary_scaling", {"type": "linear", "factor": 4})
    LinearScaling(factor=4)
    """
    kind = options.get("type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        fact = f"the rotary scaling {kind!r} is not known"
        raise PlanError([Problem(f"{where}.type", fact, nearest(str(kind), tuple(SCALINGS)))])
    values: dict[str, Any] = {
        name: value for name, value in options.items() if name != "type" and value is not None
    }
    problems = tuple(_problems(where, kind, values))
    if problems:
        raise PlanError(problems)
    return SCALINGS[kind](**values)


def _problems(where: str, kind: str, values: Mapping[str, object]) -> Iterator[Problem]:
    """Yield what is wrong with the options of a scaling."""
    fields = {field.alias or field.name: field for field in attrs.fields(SCALINGS[kind])}
    for name, value in values.items():
        if name not in fields:
            yield Problem(f"{where}.{name}", f"{kind!r} has no such option", nearest(name, tuple(fields)))
        elif name == "truncate" and type(value) is not bool:
            yield Problem(f"{where}.{name}", f"{value!r} is not true or false", "Give one of the two.")
        elif name != "truncate" and not _is_scale(value, may_be_zero=name.startswith("mscale")):
            yield Problem(f"{where}.{name}", f"{value!r} is not a number above 0", "Give a number.")
    for name, field in fields.items():
        if field.default is attrs.NOTHING and name not in values:
            fact = f"{kind!r} needs {name!r}, which is missing"
            yield Problem(where, fact, "Copy it from the checkpoint's config.json.")


def _is_scale(value: object, *, may_be_zero: bool) -> bool:
    """Whether a value is a number by which angles can be computed: neither too small, nor too large, nor NaN."""
    if type(value) is not int and type(value) is not float:
        return False
    return LEAST <= value <= MOST or (may_be_zero and value == 0)


LEAST, MOST = 1e-9, 1e9


def frequencies(
    width: int, base: float, *, fraction: float = 1.0, scaling: Scaling | None = None
) -> tuple[float, ...]:
    """Return the angle per position of each pair of a head; with `fraction` only the first values turn."""
    turned = int(width * fraction)
    plain = (base ** -(value / turned) for value in range(0, turned, 2))
    if scaling is None:
        return tuple(plain)
    pairs = turned // 2
    return tuple(scaling.scaled(frequency, pair, pairs, base) for pair, frequency in enumerate(plain))


def axes(sections: Sequence[int], *, interleaved: bool) -> tuple[int, ...]:
    """Return which axis of a multimodal position (0 time, 1 row, 2 column) each pair of a head turns by.

    `sections` says how many pairs each axis has; they are half of the head's width in total. They lie one
    after the other, or `interleaved`: every third pair is a row's, every third a column's, as long as those
    last, and all others are time's.

    >>> axes((2, 1, 1), interleaved=False)
    (0, 0, 1, 2)
    >>> axes((4, 2, 2), interleaved=True)
    (0, 1, 2, 0, 1, 2, 0, 0)
    """
    if not interleaved:
        return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
    return tuple(pair % 3 if pair < 3 * sections[pair % 3] else 0 for pair in range(sum(sections)))
