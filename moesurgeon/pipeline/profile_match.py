"""Whether a profile is of the checkpoint that it is to decide on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moesurgeon.errors import ProfileError
from moesurgeon.pipeline.subject import Subject

if TYPE_CHECKING:  # numpy is a quarter of the time to start
    from moesurgeon.profiling.artefact import Profile


def check_profile(profile: Profile, subject: Subject, path: Path) -> None:
    """Raise ProfileError if ``profile``, read from ``path``, was taken from another checkpoint than ``subject``."""
    statistics, anatomy = profile.statistics, subject.anatomy
    if profile.origin.fingerprint == subject.fingerprint:
        return
    if (statistics.layers, statistics.experts) != (anatomy.moe_layers, anatomy.experts):
        raise ProfileError(
            f"{path} counts {statistics.experts} experts in layers {list(statistics.layers)}, {subject.name} has "
            f"{anatomy.experts} in {list(anatomy.moe_layers)}; profile {subject.name} itself"
        )
    raise ProfileError(f"{path} was taken from another checkpoint than {subject.name}; profile {subject.name} itself")
