"""Two checkpoints on one text: they have to make the same tokens of it."""

from __future__ import annotations

from moesurgeon.errors import CheckpointError
from moesurgeon.pipeline.subject import Subject
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.tokenizer import has_tokenizer
from moesurgeon.traces.tokenizer_facts import tokenizers_differ


def refuse_other_tokenizer(subject: Subject, other: Subject, progress: Progress = SILENT) -> None:
    """Raise CheckpointError unless ``other`` has the tokenizer of ``subject``, which makes the text of both.

    An ``other`` without a tokenizer takes that of ``subject``, which is said.
    """
    if subject.root == other.root or not has_tokenizer(subject.root):  # without one no text is read at all
        return
    if not has_tokenizer(other.root):
        progress.note(f"note: {other.name} has no tokenizer; its text is made with the tokenizer of {subject.name}")
        return
    difference = tokenizers_differ(subject.root, other.root)
    if difference is not None:
        raise CheckpointError(
            f"{subject.name} and {other.name} have different tokenizers ({difference}): they cannot be compared on one "
            "text; give the checkpoint that it was made from, or copy the tokenizer files where they are wrong"
        )
