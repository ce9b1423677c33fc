"""The small checkpoints of all families, for the laws as well, and both builtin ones with top-1 gating."""

from __future__ import annotations

import pytest

from moesurgeon.pipeline.options import Writing
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.surgery.retop import RetopSpec
from tests.families.conftest import stock

__all__ = ["stock"]


@pytest.fixture(scope="session")
def tiny_mixtral_1(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    out = tmp_path_factory.mktemp("top-1") / "mixtral"
    retop("builtin:tiny-mixtral", RetopSpec(top_k=1), Writing(output=out, link=True))
    return open_subject(str(out))


@pytest.fixture(scope="session")
def tiny_deepseek_1(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    out = tmp_path_factory.mktemp("top-1") / "deepseek"
    retop("builtin:tiny-deepseek", RetopSpec(top_k=1), Writing(output=out, link=True))
    return open_subject(str(out))
