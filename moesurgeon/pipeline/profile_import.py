"""``profile import``: a server's token counts as a profile, to prune by frequency."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from moesurgeon.checkpoint.staging import refuse_unusable
from moesurgeon.errors import InputError
from moesurgeon.pipeline.subject import open_subject
from moesurgeon.profiling.artefact import PROFILE, Origin, Profile, save_profile
from moesurgeon.profiling.imported import DOMAIN, imported


def import_counts(file: Path, checkpoint: str, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Read the counts in ``file``, made by serving ``checkpoint``, and write a profile of them."""
    subject = open_subject(checkpoint)
    refuse_unusable(output, PROFILE, overwrite=overwrite, sources=(subject.root,))
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give the file with the counts") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text; save the counts as JSON or CSV") from error
    origin = Origin(
        fingerprint=subject.fingerprint,
        family=subject.anatomy.family.name,
        splits={DOMAIN: "all"},
        trace_hashes={DOMAIN: hashlib.sha256(content).hexdigest()},
        length=0,
        placement="imported",
        transformers="none",
    )
    profile = Profile(imported(file, text, subject.anatomy), origin)
    save_profile(profile, output, overwrite=overwrite)
    return {"checkpoint": checkpoint, "imported": str(file), "path": str(output), **profile.summary()}
