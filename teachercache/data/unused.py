"""Count what readers see and do not use: by reason, with one name each."""

import dataclasses
from typing import Any

from teachercache.data.foreign import clean


@dataclasses.dataclass
class Unused:
    """What a reader saw and did not use. Every file or line that is no part of a row is added with its reason.

    Attributes:
        reasons: For each reason the count and the name of the first.
    """

    reasons: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count something unused.

        Args:
            reason: What was not used and why, in the plural: "files are no pictures that are read (.heic)".
            name: Its file name or line.
            count: How many.
        """
        before, first = self.reasons.get(reason, (0, clean(str(name))))
        self.reasons[reason] = (before + count, first)

    def include(self, other: "Unused") -> None:
        """Add the counts of another reader."""
        for reason, (count, first) in other.reasons.items():
            self.add(reason, first, count)

    def lines(self) -> list[str]:
        """Return one line a reason for a person: "7 files are no pictures that are read (.heic): IMG_1.heic, ..."."""
        return [
            f"{count:,} {reason}: {first}{', ...' if count > 1 else ''}"
            for reason, (count, first) in self.reasons.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the counts for --json and for the metadata of a manifest."""
        return {reason: {"count": count, "first": first} for reason, (count, first) in self.reasons.items()}

    @property
    def total(self) -> int:
        """The number of things that were not used."""
        return sum(count for count, _ in self.reasons.values())


def from_json(values: Any) -> Unused:
    """Return the counts that `as_json` wrote."""
    return Unused({reason: (int(v["count"]), str(v["first"])) for reason, v in (values or {}).items()})
