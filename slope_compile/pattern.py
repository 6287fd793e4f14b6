"""N:M sparsity patterns as values: ``Pattern.parse("2:4")`` keeps 2 of every 4 consecutive weights.

In code the two numbers are called ``keep`` (N of N:M) and ``group`` (M of N:M), because ``N``, ``M`` and ``K``
already name the axes of a linear layer here: ``M`` tokens, ``N`` out_features, ``K`` in_features, ``R`` adapter
rank; a weight is ``[N, K]``.
"""

from __future__ import annotations

import dataclasses

from slope_compile.errors import ConfigError

GROUPS = (2, 4, 8)
"""Group sizes with a reference: each divides a byte, so that a group never straddles two bytes of metadata."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """``keep`` of every ``group`` consecutive entries along the reduction dimension are kept."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if self.group not in GROUPS or not 0 < self.keep < self.group:
            raise ConfigError(
                f"pattern: {self.keep}:{self.group} is not supported; the group must be one of "
                f"{', '.join(map(str, GROUPS))} and at least one but not all of it kept (for example '2:4')"
            )

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """``"2:4"`` -> ``Pattern(2, 4)``.

        Raises:
            ConfigError: the text is not two integers around a colon, or not a supported pattern.
        """
        keep, colon, group = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not (colon and keep.isdecimal() and group.isdecimal()):
            raise ConfigError(f"pattern: expected kept:group such as '2:4', got {text!r}")
        return cls(int(keep), int(group))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def density(self) -> float:
        """Kept share of the weights, 0.5 for 2:4."""
        return self.keep / self.group

    def compressed(self, length: int) -> int:
        """Kept entries among ``length`` (a multiple of ``group``)."""
        return length // self.group * self.keep

    def dense(self, length: int) -> int:
        """Inverse of :meth:`compressed`."""
        return length // self.keep * self.group
