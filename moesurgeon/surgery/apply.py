"""The one writer: an edit plan and a source become a checkpoint folder, or nothing does.

Order: check the plan and the space, write every shard into a staging folder, see that the source is
still what it was, read the result back and compare it with the plan, rename. Until the rename the
target is as it was; what a killed run had finished is taken over by the next.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moesurgeon
from moesurgeon.checkpoint.auxiliary import copy_auxiliary
from moesurgeon.checkpoint.open import CONFIG_NAME, INDEX_NAME, PROVENANCE_NAME, Checkpoint, read_json_file
from moesurgeon.checkpoint.parallel import each_of
from moesurgeon.checkpoint.reader import ShardReader, fingerprint, identity_of, refuse_changed
from moesurgeon.checkpoint.replaceable import CHECKPOINT
from moesurgeon.checkpoint.resume import STATE_NAME, digest_of, is_finished, write_finished
from moesurgeon.checkpoint.staging import staged
from moesurgeon.errors import OutputError
from moesurgeon.progress import SILENT, Progress
from moesurgeon.surgery.card import edited_card
from moesurgeon.surgery.plan import EditPlan
from moesurgeon.surgery.readback import read_back
from moesurgeon.surgery.shards import OutputShard, compiled, has_index, plan_shards

PROVENANCE_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: the folder, its tensors' bytes, and its shards.

    ``linked``: those that were not copied; ``resumed``: those that an earlier run had finished.
    """

    folder: Path
    nbytes: int
    shards: int
    linked: int
    resumed: int


def apply(
    plan: EditPlan,
    source: Checkpoint,
    target: Path,
    *,
    link: bool = False,
    overwrite: bool = False,
    shard_size: int | None = None,
    progress: Progress = SILENT,
) -> Written:
    """Write what ``plan`` makes of ``source`` to the new folder ``target``.

    ``link``: shards without any change become hard links to the source's files where the file system
    allows; both must then be treated as read-only. ``shard_size``: bytes of a file at most (default: as
    the source is divided). Raises OutputError if the disk refuses or the result does not read back as
    planned, CheckpointError if the source changes meanwhile, UsageError if the target may not be written.
    """
    plan.check(source.tensors)
    shards = plan_shards(plan, source, shard_size)
    provenance = _provenance(plan, source)
    linked: set[str] = set()
    with ShardReader(source) as reader:
        identity = provenance["history"][-1]["source"]["fingerprint"]
        plans = (compiled(shard, source, reader) for shard in shards)
        digest = digest_of(plans, source, identity, link=link)
        # A shard may be a link itself: to the blobs of a hub cache.
        homes = {source.path_of(shard).resolve().parent for shard in source.headers}
        with staged(
            target, CHECKPOINT, overwrite=overwrite, sources=(source.root, *sorted(homes)), digest=digest
        ) as staging:
            there = [compiled(shard, source, reader) for shard in shards if (staging / shard.name).exists()]
            finished = {shard.name for shard in there if is_finished(shard, staging, reader)}
            to_write = [shard for shard in shards if shard.name not in finished]
            for shard in to_write:
                if link and shard.equals and _linked(source.path_of(shard.equals), staging / shard.name):
                    linked.add(shard.name)
            to_write = [shard for shard in to_write if shard.name not in linked]
            needed = sum(shard.nbytes for shard in to_write)
            _check_space(staging, needed)
            with progress.task("writing", needed, "bytes") as advance:
                each_of(
                    to_write,
                    lambda shard, told: write_finished(compiled(shard, source, reader), reader, staging, told),
                    advance,
                )
            refuse_changed(source)
            _write_json(staging / CONFIG_NAME, plan.edited_config(source.config))
            if has_index(shards, source, shard_size):
                _write_json(staging / INDEX_NAME, _index(source, shards))
            copy_auxiliary(source.root, staging)
            for name, content in plan.files.items():
                (staging / name).write_text(content, encoding="utf-8")
            card = source.root / "README.md"
            text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
            (staging / "README.md").write_text(edited_card(text, plan), encoding="utf-8")
            written = read_back(staging, plan, source, reader)
            provenance["history"][-1]["result"] = asdict(identity_of(written))
            provenance["files"] = _files(staging)
            _write_json(staging / PROVENANCE_NAME, provenance)
    return Written(target, plan.nbytes, len(shards), len(linked), len(finished))


def _index(source: Checkpoint, shards: Sequence[OutputShard]) -> dict[str, Any]:
    places = {output.spec.name: shard.name for shard in shards for output in shard.outputs}
    metadata = {**source.index_metadata, "total_size": sum(shard.nbytes for shard in shards)}
    metadata.pop("total_parameters", None)  # transformers writes it; it would be stale
    return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}


def _provenance(plan: EditPlan, source: Checkpoint) -> dict[str, Any]:
    """Return what ``moesurgeon.json`` says: the source, each operation, every dropped tensor."""
    history: list[Any] = []
    if (source.root / PROVENANCE_NAME).exists():
        recorded = read_json_file(source.root, PROVENANCE_NAME).get("history")
        history = recorded if isinstance(recorded, list) else []
    step = {
        "moesurgeon": moesurgeon.__version__,
        "source": {"fingerprint": fingerprint(source), "bytes": source.nbytes},
        "operations": list(plan.record),
        "dropped": dict(plan.dropped),
    }
    return {"schema_version": PROVENANCE_SCHEMA, "history": [*history, step]}


def _files(staging: Path) -> list[str]:
    """Return what was written, so that ``--overwrite`` knows its own from what is put beside it later."""
    files = (path for path in staging.rglob("*") if path.is_file() and path.name != STATE_NAME)
    return sorted(path.relative_to(staging).as_posix() for path in files)


def _linked(original: Path, path: Path) -> bool:
    path.unlink(missing_ok=True)
    try:
        os.link(original.resolve(), path)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            return False
        raise
    return True


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(f"the output needs {needed:,} bytes, {folder.parent} has {free:,} free; choose another disk")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
