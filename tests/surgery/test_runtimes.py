"""What runtimes make of a result is said where it is written, and vLLM gets the file that it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moesurgeon.errors import OutputError, UsageError
from moesurgeon.pipeline.evaluate import evaluate
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.retop import retop
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.verify import verify
from moesurgeon.surgery.apply import apply
from moesurgeon.surgery.layouts import plan_layout
from moesurgeon.surgery.plan import EditPlan, identity
from moesurgeon.surgery.retop import RetopSpec
from moesurgeon.surgery.runtimes import runtime_statements
from tests.families.factory import config_of, save_checkpoint

DEEPSEEK, MIXTRAL = "builtin:tiny-deepseek", "builtin:tiny-mixtral"
FILE = "configuration_deepseek.py"


@pytest.mark.parametrize(
    ("name", "layout", "says"),
    [
        (MIXTRAL, None, []),
        (MIXTRAL, "fused", ["4.57 loads random ones with only a warning, vLLM and llama.cpp's converter refuse"]),
        (DEEPSEEK, None, ["vLLM needs --trust-remote-code and a configuration_deepseek.py"]),
        (DEEPSEEK, "fused", ["only moesurgeon's own modelling file was tried"]),
        (DEEPSEEK, "qwen2-moe", ["llama.cpp and SGLang take every layer of a Qwen2-MoE as a mixture"]),
    ],
)
def test_each_layout_says_who_reads_it(tmp_path: Path, name: str, layout: str | None, says: list[str]) -> None:
    reports = [
        retop(name, RetopSpec(top_k=1), Writing(output=tmp_path / "out", layout=layout, dry_run=dry_run))
        for dry_run in (True, False)
    ]
    assert reports[0]["runtimes"] == reports[1]["runtimes"]
    assert len(reports[0]["runtimes"]) == len(says)
    assert all(part in line for part, line in zip(says, reports[0]["runtimes"], strict=True))


def test_a_qwen2_moe_without_its_biases_is_warned_of(tmp_path: Path) -> None:
    source = open_subject(str(save_checkpoint(tmp_path / "source", "deepseek", first_k_dense_replace=0)))
    without, with_them = (plan_layout(source.anatomy, "qwen2-moe", biases=biases) for biases in (False, True))
    assert ["vLLM computes NaN without a word" in line for line in _said(source, without)] == [True]
    assert _said(source, with_them) == []


def _said(source: Subject, plan: EditPlan) -> list[str]:
    return runtime_statements(plan.result(source.anatomy), ())


def test_the_config_class_for_vllm(tmp_path: Path) -> None:
    writing = Writing(output=tmp_path / "out", vllm_config=True)
    report = retop(DEEPSEEK, RetopSpec(top_k=1), writing)
    assert report["plan"]["files"] == [FILE]
    assert ["so does vLLM with --trust-remote-code" in line for line in report["runtimes"]] == [True]
    assert config_of(tmp_path / "out")["auto_map"] == {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    assert verify(str(tmp_path / "out"), DEEPSEEK)["tensors_equal"] == 186
    # As vLLM does, in a process without moesurgeon's classes.
    program = (
        "import sys; from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(config.model_type, config.n_routed_experts, config.num_experts_per_tok, config.first_k_dense_replace)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["deepseek", "16", "1", "1"]
    (tmp_path / "out" / FILE).write_text("other")
    with pytest.raises(OutputError, match=f"{FILE} is not what its record says"):
        verify(str(tmp_path / "out"), DEEPSEEK)


def test_the_config_class_goes_along_and_is_never_run(tmp_path: Path) -> None:
    retop(DEEPSEEK, RetopSpec(top_k=4), Writing(output=tmp_path / "out", vllm_config=True))
    (tmp_path / "out" / FILE).write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nraise SystemExit('was run')\n")
    retop(str(tmp_path / "out"), RetopSpec(top_k=1), Writing(output=tmp_path / "next"))
    assert (tmp_path / "next" / FILE).read_text() == (tmp_path / "out" / FILE).read_text()
    assert config_of(tmp_path / "next")["auto_map"]
    text = Text(traces=("builtin:json",), max_tokens=256, length=64)
    assert evaluate(str(tmp_path / "next"), None, text, Running(device="cpu"))["loss"] > 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=f"has a {FILE} already"):
        retop(str(tmp_path / "out"), RetopSpec(top_k=1), Writing(output=tmp_path / "again", vllm_config=True))


@pytest.mark.parametrize(("name", "layout"), [(MIXTRAL, None), (DEEPSEEK, "fused"), (DEEPSEEK, "qwen2-moe")])
def test_other_results_need_no_such_file(tmp_path: Path, name: str, layout: str | None) -> None:
    writing = Writing(output=tmp_path / "out", layout=layout, vllm_config=True, dry_run=True)
    with pytest.raises(UsageError, match="--vllm-config is for DeepSeek-MoE v1 in its own names"):
        retop(name, RetopSpec(top_k=1), writing)


def test_other_entries_of_auto_map_stay(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "source", "deepseek")
    auto_map = {"AutoModelForCausalLM": "other/repo--modeling.Model", "AutoConfig": "gone.Config"}
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "auto_map": auto_map}))
    retop(str(folder), RetopSpec(top_k=1), Writing(output=tmp_path / "out", vllm_config=True))
    written = config_of(tmp_path / "out")["auto_map"]
    assert written == {**auto_map, "AutoConfig": "configuration_deepseek.DeepseekConfig"}


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        retop(DEEPSEEK, RetopSpec(top_k=1), Writing(output=tmp_path / name, layout="qwen2-moe"))
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one == other
    source = open_subject(str(tmp_path / "one"))
    apply(identity(source.anatomy), source.checkpoint, tmp_path / "copy")
    assert verify(str(tmp_path / "copy"))["tensors"] == 201
