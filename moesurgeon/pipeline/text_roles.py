"""The text of a recipe by what it is for: what calibrates, what judges healing, what is reported on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moesurgeon.pipeline.options import Text

_ROLES = ("calibration", "validation", "report")


@dataclass(frozen=True, kw_only=True)
class RoleText(Text):
    """Traces for one role each; ``calibration`` is another word for ``traces``.

    With ``validation`` the calibration text is read whole, without it healing reads both in their splits. Without
    ``report`` evaluations read the report split of the calibration text.
    """

    calibration: tuple[str, ...] | None = None
    validation: tuple[str, ...] | None = None
    report: tuple[str, ...] | None = None

    @property
    def problem(self) -> str | None:
        """What is contradictory, and what to do; None if nothing is."""
        for role in _ROLES:
            if getattr(self, role) == ():
                return f"{role} names no traces; list at least one, or leave the key out"
        if self.calibration and self.traces != Text().traces:
            return "traces and calibration are two words for one thing; keep one of them"
        if self.validation and not self.report:
            return (
                "validation is given without report: calibration is read whole then, and what judges healing is not "
                "to be reported on; name files under report"
            )
        return None

    @property
    def calibrating(self) -> Text:
        """What profiles, healing and recovery read."""
        given = {field.name: getattr(self, field.name) for field in fields(Text)}
        return Text(**{**given, "traces": self.calibration or self.traces})

    def profiled(self, max_tokens: int | None) -> Text:
        """Return what a profile reads: of the user's calibration text all, or its calibration split."""
        split = self.split or (None if self.validation else "calibration")
        return replace(self.calibrating, split=split, max_tokens=max_tokens)

    def reported(self, max_tokens: int | None) -> Text:
        """Return what evaluations read, evenly of all domains."""
        if self.report:
            return Text(traces=self.report, max_tokens=max_tokens, length=self.length, sample=self.sample)
        return self.calibrating.even(split=self.split or "report", max_tokens=max_tokens)
