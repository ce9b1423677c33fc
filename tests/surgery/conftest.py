"""A source and what was made of it, for those that verify the one against the other."""

from pathlib import Path

import pytest

from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.apply import apply
from tests.families.factory import save_checkpoint
from tests.surgery.verified import edited


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_checkpoint(tmp_path_factory.mktemp("source"), "deepseek")))


@pytest.fixture(scope="module")
def pruned(source: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with one expert per token and half of the experts; not to be written into."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    apply(edited(source, "per-expert"), source.checkpoint, folder)
    return folder
