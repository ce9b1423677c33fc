"""``profile merge``: several profiles of one checkpoint as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.staging import refuse_unusable
from moesurgeon.errors import UsageError
from moesurgeon.profiling.artefact import PROFILE, load_profile, save_profile
from moesurgeon.profiling.merging import merged_profiles


def merge(paths: Sequence[Path], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Add up the profiles in ``paths`` and write the sum to ``output``."""
    if len(paths) < 2:
        raise UsageError(f"{paths[0]} alone is nothing to merge; name two profiles or more")
    refuse_unusable(output, PROFILE, overwrite=overwrite, sources=tuple(paths))
    merged, notes = merged_profiles([(path, load_profile(path)) for path in paths])
    save_profile(merged, output, overwrite=overwrite)
    return {"path": str(output), "merged": [str(path) for path in paths], "notes": notes, **merged.summary()}
