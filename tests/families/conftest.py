"""Small checkpoints of the families, saved once per run; tests must not write into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.factory import packed, quantised, save_checkpoint

Stock = Callable[[str], Path]


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Return the folder of a checkpoint by name: a model type, "... fused", "... fp8" or "... mxfp4"."""
    home = tmp_path_factory.mktemp("families")

    def folder_of(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            model_type, _, kind = name.partition(" ")
            match kind:
                case "fp8":
                    quantised(folder_of(model_type), folder)
                case "mxfp4":
                    packed(folder_of(f"{model_type} fused"), folder)
                case _:
                    fused = kind == "fused"
                    save_checkpoint(folder, model_type, fused=fused, mtp=model_type == "deepseek_v3" and not fused)
        return folder

    return folder_of
