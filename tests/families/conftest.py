"""Small checkpoints of the families, saved once per run; tests must not write into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.factory import save_checkpoint
from tests.families.variants import packed, quantised, with_hub_names, with_mtp_layer

Stock = Callable[[str], Path]


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Return the folder of a checkpoint by name: a model type alone, or one and the kind of checkpoint.

    "fused": as transformers holds it; "fp8", "mxfp4": quantised; "mtp": with a layer for multi-token
    prediction; "saved": as transformers saves it, where the hub's names are others.
    """
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
                case "mtp":
                    with_mtp_layer(folder_of(model_type), folder)
                case _:
                    save_checkpoint(folder, model_type, fused=kind == "fused")
                    if name == "deepseek_v4":
                        with_hub_names(folder)
        return folder

    return folder_of
