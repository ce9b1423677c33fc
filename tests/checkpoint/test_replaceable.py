"""What ``--overwrite`` may replace: what is recognised, and holds nothing of anybody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesurgeon.checkpoint.replaceable import CHECKPOINT, refuse_strange
from moesurgeon.errors import UsageError
from moesurgeon.pipeline.run_folder import RUN, make_way, remove_previous
from moesurgeon.profiling.artefact import PROFILE
from moesurgeon.recovery.folder import ADAPTER

HUB = (
    "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "configuration_deepseek.py",
    "modeling_deepseek.py", "figure.png", ".gitattributes", ".cache/huggingface/download/config.json.metadata",
    "additional_chat_templates/tool.jinja", "__pycache__/modeling_deepseek.cpython-311.pyc",
)  # fmt: skip


def _made(folder: Path, *names: str, config: object = {"model_type": "mixtral"}) -> Path:
    for name in ("model.safetensors", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_from_the_hub_is_replaced(tmp_path: Path) -> None:
    refuse_strange(_made(tmp_path, *HUB), CHECKPOINT)


@pytest.mark.parametrize(
    "stranger",
    [".git/HEAD", "src/main.c", "main.py", "train.py", "notes.txt", "notes.md", "keep.json", "data.jsonl",
     "original/params.json", ".cache/pip/x", ".env", "additional_chat_templates/notes.txt", "model.tar.gz",
     "optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "training_args.bin", "mixtral-q4.gguf"],
)  # fmt: skip
def test_what_is_no_part_of_a_checkpoint_is_named(stranger: str, tmp_path: Path) -> None:
    _made(tmp_path, stranger)
    first = stranger.partition("/")[0]
    with pytest.raises(UsageError, match=rf"no part of a checkpoint \({first.replace('.', '[.]')}"):
        refuse_strange(tmp_path, CHECKPOINT)


def test_a_link_to_a_folder_is_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = _made(tmp_path / "out")
    (folder / "assets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="assets"):
        refuse_strange(folder, CHECKPOINT)


@pytest.mark.parametrize("config", [{"port": 8080}, [], {}], ids=str)
def test_any_config_makes_no_checkpoint(config: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a checkpoint .*choose another folder"):
        refuse_strange(_made(tmp_path, config=config), CHECKPOINT)


def test_weights_make_a_checkpoint(tmp_path: Path) -> None:
    (_made(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="is not a checkpoint"):
        refuse_strange(tmp_path, CHECKPOINT)


def test_what_was_written_is_known_by_the_record(tmp_path: Path) -> None:
    """A checkpoint may bring files along that no pattern knows."""
    _made(tmp_path, "evals.json", "docs/how.txt")
    (tmp_path / "moesurgeon.json").write_text(
        json.dumps({"files": ["config.json", "model.safetensors", "evals.json", "docs/how.txt", 5]})
    )
    refuse_strange(tmp_path, CHECKPOINT)
    (tmp_path / "docs" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"docs/mine\.txt"):
        refuse_strange(tmp_path, CHECKPOINT)


@pytest.mark.parametrize("stranger", ["pytorch_model.bin", "model-extra.safetensors", "LICENSE", "modeling_mine.py"])
def test_beside_a_record_nothing_else_is_ours(stranger: str, tmp_path: Path) -> None:
    _made(tmp_path, stranger)
    (tmp_path / "moesurgeon.json").write_text(json.dumps({"files": ["config.json", "model.safetensors"]}))
    with pytest.raises(UsageError, match=stranger.replace(".", "[.]")):
        refuse_strange(tmp_path, CHECKPOINT)


@pytest.mark.parametrize("record", ["", "[]", "{", '{"files": 5}', "[" * 100_000], ids=lambda text: text[:9])
def test_a_damaged_record_makes_nothing_ours(record: str, tmp_path: Path) -> None:
    (_made(tmp_path, "evals.json") / "moesurgeon.json").write_text(record)
    with pytest.raises(UsageError, match=r"evals\.json"):
        refuse_strange(tmp_path, CHECKPOINT)


def test_few_of_many_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\(1\.c, 2\.c, 3\.c and 2 more\)"):
        refuse_strange(_made(tmp_path, *(f"{number}.c" for number in range(1, 6))), CHECKPOINT)


def test_profiles_and_adapters(tmp_path: Path) -> None:
    for kind, facts, name in ((PROFILE, "profile.json", "stats"), (ADAPTER, "adapter_config.json", "adapter_model")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / facts).write_text(json.dumps({key: 2 for key in kind.keys}))
        (folder / f"{name}.safetensors").write_text("x")
        refuse_strange(folder, kind)
        (folder / "heat.png").write_text("mine")
        with pytest.raises(UsageError, match=r"heat\.png"):
            refuse_strange(folder, kind)
        (folder / facts).write_text('{"me": "and my project"}')
        with pytest.raises(UsageError, match="does not replace it"):
            refuse_strange(folder, kind)


def _run(folder: Path) -> Path:
    for stage in ("stages/01-retop", "checkpoint", "rejected"):
        (folder / stage).mkdir(parents=True)
        _made(folder / stage, "tokenizer.json")
    for profile in ("stages/02-profile", "usage/00-original"):
        (folder / profile).mkdir(parents=True)
        (folder / profile / "profile.json").write_text('{"schema_version": 2}')
        (folder / profile / "stats.safetensors").write_text("x")
    (folder / "stages" / "03-sample-own.jsonl").write_text("")
    (folder / "stages" / ".04-prune.moesurgeon" / "deep").mkdir(parents=True)  # of a step that was killed
    (folder / "journal.jsonl").write_text('{"stage": "original"}\n')
    (folder / "figures.json").write_text("{}")
    return folder


def test_a_run_makes_way(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    refuse_strange(folder, RUN)
    with pytest.raises(UsageError, match="holds a run already"):
        make_way(folder, overwrite=False)
    previous = make_way(folder, overwrite=True)
    assert (previous / "figures.json").is_file() and not (folder / "figures.json").exists()
    assert make_way(folder, overwrite=True) == previous  # the one between failed
    remove_previous(previous)
    assert not previous.exists()


@pytest.mark.parametrize(
    "stranger", ["notes.txt", ".git/HEAD", "stages/mine/x", "stages/01-retop/mine.txt", "usage/x.py"]
)
def test_a_run_with_something_else_stays(stranger: str, tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    path = folder / stranger
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"no part of the folder of a run"):
        make_way(folder, overwrite=True)
    assert path.read_text() == "mine"
    path.rename(tmp_path / "aside")


def test_what_was_put_into_the_earlier_run_stays(tmp_path: Path) -> None:
    previous = make_way(_run(tmp_path / "run"), overwrite=True)
    (previous / "notes.txt").write_text("mine")
    remove_previous(previous)
    assert (previous / "notes.txt").read_text() == "mine"
    with pytest.raises(UsageError, match=r"notes\.txt"):
        make_way(tmp_path / "run", overwrite=True)
