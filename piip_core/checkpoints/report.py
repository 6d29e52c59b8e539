"""The account of a conversion: what happened to every key of the file and to every tensor of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..errors import CheckpointError

__all__ = ["ConversionReport"]

MAX_LISTED = 20


@dataclass
class ConversionReport:
    """Complete account of a conversion from one set of names to another.

    Attributes:
        source: What was converted, for messages (a file name).
        used: Source key -> target name.
        ignored: Source key -> why it is not needed.
        filled: Target name -> how it got its value although the source has none.
        unexplained: Source keys that no rule knows.
        missing: Target names that nothing provides.
        mismatched: Target name -> shapes of source and target.
        notes: Anything else worth knowing, such as casts.
    """

    source: str = "checkpoint"
    used: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every source key and every target tensor is accounted for."""
        return not (self.unexplained or self.missing or self.mismatched)

    def note(self, text: str) -> None:
        """Adds a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def check(self, *, allow_incomplete: bool = False) -> ConversionReport:
        """Returns the report itself if it is complete, or if incompleteness was asked for.

        Raises:
            CheckpointError: Otherwise; the message lists the keys. Shapes that differ are never allowed.
        """
        if self.complete or (allow_incomplete and not self.mismatched):
            return self
        problems = "\n".join(self.problems())
        way_out = "" if self.mismatched else ", or go on without these keys (allow_incomplete=True, --allow-incomplete)"
        raise CheckpointError(
            f"{self.source} does not fit the model:\n{problems}\n"
            f"Use the configuration that the file was made with{way_out}"
        )

    def summary(self) -> str:
        """Multi-line text: counts, then every reason with the number of its keys, then every problem."""
        lines = [
            f"{self.source}: {len(self.used)} keys used, {len(self.ignored)} ignored with a reason, "
            f"{len(self.unexplained)} unexplained; {len(self.filled)} tensors filled, {len(self.missing)} missing"
        ]
        lines += [f"  note: {note}" for note in self.notes]
        for title, reasons in (("ignored", self.ignored), ("filled", self.filled)):
            for reason, count in Counter(reasons.values()).items():
                keys = [key for key, why in reasons.items() if why == reason]
                lines.append(f"  {title} {count}: {reason} ({_listed(keys, 3)})")
        return "\n".join(lines + self.problems())

    def problems(self) -> list[str]:
        """What makes it incomplete, a line each."""
        lines = []
        if self.unexplained:
            lines.append(f"  {len(self.unexplained)} keys that no rule knows: {_listed(self.unexplained)}")
        if self.missing:
            lines.append(f"  {len(self.missing)} tensors of the model that the file lacks: {_listed(self.missing)}")
        lines += [f"  {name}: {shapes}" for name, shapes in list(self.mismatched.items())[:MAX_LISTED]]
        return lines


def _listed(keys: list[str], limit: int = MAX_LISTED) -> str:
    more = f", and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
