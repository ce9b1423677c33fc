"""The folder of adapters that ``recover`` writes, if asked to, beside the checkpoint into which they are merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moesurgeon.checkpoint.staging import overlap, refuse_unusable, staged
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.options import Writing
from moesurgeon.recovery.folder import ADAPTER, Adapter, refuse_no_adapter


def refuse_adapter(folder: Path | None, adapt: Sequence[str], writing: Writing, sources: tuple[Path, ...]) -> None:
    """Raise UsageError or OutputError now if ``folder`` could not be written later."""
    if folder is None:
        return
    refuse_no_adapter(adapt)
    if not writing.dry_run:
        refuse_unusable(folder, ADAPTER, overwrite=writing.overwrite, sources=sources)
    if overlap(folder, writing.output):
        raise UsageError(f"--save-adapter {folder} and the output {writing.output} overlap; choose a folder of its own")


@contextmanager
def beside(folder: Path | None, adapter: Adapter | None, source: str, writing: Writing) -> Iterator[None]:
    """Write ``adapter``, of the checkpoint ``source``, to ``folder`` if the checkpoint is written inside the context.

    The folder is there whole or not at all. Where nothing was better than the start there is no adapter.
    """
    if folder is None or adapter is None:
        yield
        return
    with staged(folder, ADAPTER, overwrite=writing.overwrite) as place:
        adapter.save(place, source)
        yield
