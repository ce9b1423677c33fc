"""What cannot work is refused before a recipe's first step, not after the hours of the steps before it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from moesurgeon.checkpoint.header import TensorSpec
from moesurgeon.errors import CheckpointError, InputError, MoeSurgeonError, NothingToDo, OutputError, UsageError
from moesurgeon.pipeline import run as module
from moesurgeon.pipeline.options import HealSpec, Running, Text, Writing
from moesurgeon.pipeline.profile import ProfileOutput, profile
from moesurgeon.pipeline.prune import prune
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import Recipe
from moesurgeon.pipeline.recipe_steps import usage_text
from moesurgeon.pipeline.recover import RecoverSpec
from moesurgeon.pipeline.recover_check import check_training
from moesurgeon.pipeline.run import RunOutput, run
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.targets import Adapt
from tests.conftest import BUILTIN

SIX = json.dumps({layer: [0, 1, 2, 3, 4, 5] for layer in range(4)})
ALL = json.dumps({layer: list(range(8)) for layer in range(4)})
NINE = json.dumps({layer: [0, 1, 2, 3, 4, 9] for layer in range(4)})
DOCUMENT = "Some text that is long enough for a window of it, and a few words more. " * 20
HEAL = "heal: {traces: [builtin:json]}"


class Case(NamedTuple):
    """The lines of a recipe behind its checkpoint, how it is refused, and what is said."""

    lines: str
    error: type[MoeSurgeonError]
    says: str


CASES = {
    "a criterion": Case(
        "steps: [{profile: {}}, {prune: {keep: 6, criterion: bogus}}]", UsageError,
        r"recipe.yaml, line 2, column 32: steps.1.prune: --criterion bogus is not one of frequency",
    ),
    "a criterion of stages": Case(
        f"steps: [{{prune: {{stages: [7], criterion: bogus, {HEAL}}}}}]", UsageError, "--criterion bogus is not one of"
    ),
    "a seed": Case("steps: [{profile: {}}, {prune: {keep: 6, criterion: random, seed: -1}}]", UsageError, "--seed -1"),
    "protection": Case(
        "text: {traces: [builtin:json]}\nsteps: [{profile: {}}, {prune: {keep: 6, protect: [nope]}}]", UsageError,
        "--protect nope: the profile has no domain 'nope', only json",
    ),
    "protection twice": Case(
        "text: {traces: [builtin:json]}\nsteps: [{profile: {}}, {prune: {keep: 6, protect: [json, json=0.3]}}]",
        UsageError, "--protect names json twice",
    ),
    "protection in stages": Case(  # of which the second is profiled on what heals
        f"text: {{traces: [builtin:logs]}}\n"
        f"steps: [{{profile: {{}}}}, {{prune: {{stages: [7, 6], protect: [logs], {HEAL}}}}}]", UsageError,
        "--protect logs: the profile has no domain 'logs', only json",
    ),
    "long context": Case(
        "steps: [{profile: {}}, {prune: {keep: 6, protect: [long-context]}}]", UsageError, "raise the length"
    ),
    "the same top-k": Case("steps: [{retop: {top_k: 2}}]", NothingToDo, "top-2 by then, so nothing would change"),
    "the same top-k, healed": Case(
        f"steps: [{{retop: {{}}}}, {{retop: {{{HEAL}}}}}]", NothingToDo, "steps.1.retop: .* top-1 by then"
    ),
    "the same count": Case("steps: [{profile: {}}, {prune: {keep: 8}}]", NothingToDo, "has 8 experts by then"),
    "the same count again": Case(
        "steps: [{prune: {keep_experts: six}}, {profile: {}}, {prune: {keep: 6}}]", NothingToDo, "has 6 experts by then"
    ),
    "the same count, judged": Case(
        f"steps: [{{prune: {{keep: 8, gates: [loss < 9], {HEAL}}}}}]", NothingToDo, "has 8 experts by then"
    ),
    "a file that keeps all": Case("steps: [{prune: {keep_experts: all}}]", NothingToDo, "keeps all 8 experts"),
    "a file that is not there": Case("steps: [{prune: {keep_experts: none}}]", InputError, "none cannot be read"),
    "a file of another checkpoint": Case("steps: [{prune: {keep_experts: nine}}]", InputError, "has no expert 9"),
    "a file of a state before": Case(
        "steps: [{prune: {keep_experts: six}}, {prune: {keep_experts: all}}]", InputError, "has no expert [67]"
    ),
    "no profile": Case("steps: [{prune: {keep: 6, profile: none}}]", InputError, "none is no profile"),
    "no profile for retop": Case("steps: [{retop: {profile: none}}]", InputError, "none is no profile"),
    "a profile of another checkpoint": Case(
        "steps: [{prune: {keep: 6, profile: deepseek}}]", InputError, "deepseek counts 16 experts"
    ),
    "a profile of another checkpoint for retop": Case(
        "steps: [{retop: {profile: deepseek}}]", InputError, "deepseek counts 16 experts"
    ),
    "a profile of a state before": Case(
        "steps: [{prune: {keep_experts: six}}, {prune: {keep: 5, profile: mixtral}}]", InputError,
        "mixtral counts 8 experts in layers .* has 6 in",
    ),
    "a profile without inner products": Case(
        "steps: [{prune: {keep: 6, profile: mixtral, criterion: reconstruction}}]", InputError, "has no inner products"
    ),
    "a profile without the domain": Case(
        "steps: [{prune: {keep: 6, profile: mixtral, protect: [code]}}]", UsageError, "has no domain 'code', only json"
    ),
    "stages without inner products": Case(
        f"steps: [{{profile: {{}}}}, {{prune: {{stages: [7], criterion: reconstruction, {HEAL}}}}}]", UsageError,
        r"say profile: \{inner: 4096\}",
    ),
    "a curve of stages": Case(
        f"steps: [{{prune: {{stages: [7], curve: true, {HEAL}}}}}]", UsageError, "--curve is for a cut in one step"
    ),
    "a picture": Case(
        "steps: [{profile: {inner: 64}}, {prune: {keep: 6, curve_plot: x.bmp}}]", UsageError, "x.bmp is neither"
    ),
    "a gate of stages": Case(
        f"steps: [{{prune: {{keep: 6, gates: ['perplexity_rato < 2'], {HEAL}}}}}]", UsageError, "perplexity_rato"
    ),
    "healing on all": Case(
        "text: {split: all}\nsteps: [{retop: {heal: {}}}]", UsageError, "text: split: all is what every step would read"
    ),
    "recovery on all": Case("text: {split: all}\nsteps: [{retop: {}}, {recover: {}}]", UsageError, "split"),
    "recovery on the report": Case(
        "text: {split: report}\nsteps: [{retop: {}}, {recover: {}}]", UsageError, "split: report is what every step"
    ),
    "changed without experts": Case(
        "steps: [{retop: {}}, {recover: {adapt: [routers], changed: 0.1}}]", UsageError, "none are trained; add --adapt"
    ),
    "nothing to recover": Case("steps: [{recover: {}}]", UsageError, "is its own teacher here"),
    "a folder that may not be": Case(
        "steps: [{retop: {}}, {recover: {cache: six/folder}}]", UsageError, "six is a file"
    ),
    "one log for two": Case(
        "steps: [{retop: {}}, {recover: {log: l.csv}}, {recover: {log: l.csv}}]", UsageError,
        "steps.2.recover: log: .*l.csv is written by a step before",
    ),
    "stages within the run": Case(
        f"steps: [{{prune: {{stages: [7], run: out/run, {HEAL}}}}}]", UsageError, "overlap; name a folder of its own"
    ),
    "merging in retop": Case(
        "steps: [{retop: {heal: {merge: true}}}]", UsageError, "merge: true} is for prune"
    ),
    "one document": Case("text: {traces: [one.jsonl]}\nsteps: [{retop: {}}]", InputError, "text: .*one.jsonl"),
    "one document to heal on": Case(
        "text: {traces: [builtin:json]}\nsteps: [{retop: {heal: {traces: [one.jsonl]}}}]", InputError, "one.jsonl"
    ),
    "documents without text": Case(
        "text: {traces: [short.jsonl]}\nsteps: [{profile: {}}]", InputError, "short.jsonl"
    ),
    "a column": Case("text: {traces: ['a=many.jsonl:body']}\nsteps: [{retop: {}}]", InputError, "body"),
    "too few tokens to report": Case("report_tokens: 16\nsteps: [{retop: {}}]", UsageError, "too few for 6 traces"),
    "too few tokens to heal": Case(
        "steps: [{sample: {}}, {retop: {heal: {max_tokens: 50}}}]", UsageError, "50 tokens are too few for 7 traces"
    ),
    "too few tokens to judge": Case(
        "steps: [{retop: {heal: {heldout_tokens: 40}}}]", UsageError, "40 tokens are too few for 6 traces"
    ),
    "text that heals and judges": Case(
        "text: {calibration: [many.jsonl], validation: [late.jsonl], report: ['builtin:json']}\n"
        "steps: [{retop: {}}, {prune: {keep_experts: six, heal: {}}}]", InputError, "what heals cannot judge"
    ),
    "a single sample": Case(
        "steps: [{sample: {tokens: 64, length: 64}}, {retop: {heal: {}}}]", UsageError, "can be a single text"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what recipes name."""
    folder = tmp_path_factory.mktemp("given")
    for name, content in (("six", SIX), ("all", ALL), ("nine", NINE)):
        (folder / name).write_text(content)
    many = [f"{n} {DOCUMENT}" for n in range(40)]
    for name, texts in (("one", [DOCUMENT]), ("short", ["a b"] * 40), ("many", many), ("late", many[38:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, checkpoint in (("mixtral", BUILTIN[0]), ("deepseek", BUILTIN[1])):
        text = usage_text(_recipe("builtin:json"), 256)
        profile(checkpoint, ProfileOutput(output=folder / name), text, Running(device="cpu"))
    return folder


def _recipe(trace: str) -> Recipe:
    return Recipe.model_validate({"checkpoint": BUILTIN[0], "text": {"traces": (trace,)}, "steps": [{"retop": {}}]})


@pytest.fixture
def folder(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe's folder, where nothing may be measured."""
    monkeypatch.setattr(module, "_measured", lambda *_arguments, **_named: pytest.fail("the run had begun"))
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _run(folder: Path, lines: str) -> None:
    (folder / "recipe.yaml").write_text(f"checkpoint: {BUILTIN[0]}\n{lines}\n")
    run(folder / "recipe.yaml", RunOutput(output=folder / "out"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_cannot_work_is_refused_at_once(case: Case, folder: Path) -> None:
    with pytest.raises(case.error, match=case.says) as raised:
        _run(folder, case.lines)
    assert str(raised.value).startswith(f"{folder}/recipe.yaml, line ") and "\n" not in str(raised.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "lines",
    [
        "steps: [{profile: {}}, {prune: {below: 0.01}}, {profile: {}}, {prune: {keep: 4}}]",
        "steps: [{prune: {keep: 6, profile: mixtral, protect: [json, low-support]}}]",
        "steps: [{prune: {keep_experts: six, profile: mixtral}}, {retop: {}}, {recover: {}}]",
        "steps: [{prune: {keep_experts: six}}, {prune: {keep_experts: six}}]",
        f"steps: [{{prune: {{stages: [7, 6], gates: ['domains.json.loss < 9'], {HEAL}}}}}, {{retop: {{}}}}]",
        "text: {traces: [many.jsonl], split: report}\nsteps: [{profile: {}}, {prune: {keep: 6}}]",
        "text: {traces: [many.jsonl]}\nsteps: [{retop: {heal: {}}}, {recover: {}}]",
    ],
)
def test_what_may_work_is_not_refused(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begun(*_arguments: object, **_named: object) -> None:
        raise Begun

    monkeypatch.setattr(module, "_measured", begun)
    if "keep_experts: six}}, {prune: {keep_experts: six" in lines:
        with pytest.raises(NothingToDo, match="keeps all 6 experts"):
            _run(folder, lines)
        return
    with pytest.raises(Begun):
        _run(folder, lines)


def test_a_disk_that_is_too_small_is_found_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all the checkpoints together: they stay in the run's folder."""
    one = 7_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10 * one, 0, 2 * one))
    monkeypatch.setattr(module, "_measured", lambda *_arguments, **_named: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(OutputError, match=r"takes [\d,]+ bytes, and .* has 14,000,000 free"):
        _run(folder, "steps: [{retop: {}}, {prune: {keep_experts: six}}, {profile: {}}, {prune: {keep: 5}}]")
    with pytest.raises(KeyboardInterrupt):
        _run(folder, "steps: [{retop: {}}, {prune: {keep_experts: six}}]")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_is_found_at_once(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="may not be written to"):
        _run(folder, "steps: [{retop: {}}, {recover: {cache: locked/cache}}]")


@pytest.mark.parametrize("adapt", ["routers", "experts", "experts-all"])
def test_what_is_stored_in_few_bits_cannot_be_trained(adapt: Adapt, tiny: Subject) -> None:
    """Said from the headers: before the teacher is asked, which takes hours."""
    anatomy, kinds = tiny.anatomy, {"routers": (), "experts": ("expert", "fused"), "experts-all": ("shared",)}
    layer = anatomy.moe_layers[-1]
    names = [name for name, _role in anatomy.of_kind(*kinds[adapt], layer=layer)] or [anatomy.router_weight(layer)]
    spec = RecoverSpec(teacher=tiny.name, adapt=(adapt,))
    check_training(anatomy, spec, Text())
    if adapt == "experts-all" and names == [anatomy.router_weight(layer)]:
        return  # there is no shared expert
    stored = anatomy.tensors[names[-1]]
    few = replace(anatomy, tensors={**anatomy.tensors, stored.name: TensorSpec(stored.name, "F8_E4M3", stored.shape)})
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3; only BF16, F16, F32 can be trained"):
        check_training(few, spec, Text())


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"criterion": "bogus"}, UsageError, "--criterion bogus is not one of"),
        ({"protect": ("nope",)}, UsageError, "--protect nope: the profile has no domain"),
        ({"curve": True}, UsageError, "--curve is for a cut in one step"),
        ({"profile": Path("nowhere")}, InputError, "nowhere is no profile"),
        ({"stages": None, "keep": 8}, NothingToDo, "all 8 experts of every layer would stay"),
    ],
)
def test_a_cut_in_stages_is_checked_before_its_text_is_read(
    spec: dict[str, object], error: type[MoeSurgeonError], says: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesurgeon.pipeline.healing_text.read_text", pytest.fail)
    asked = {"stages": (7, 6), "gates": ("loss < 99",), "heal": HealSpec(traces=("builtin:json",)), **spec}
    with pytest.raises(error, match=says):
        prune(BUILTIN[0], PruneSpec(**asked), Writing(output=out))  # type: ignore[arg-type]
    assert list(out.parent.iterdir()) == []


def test_healing_that_would_not_fit_on_the_disk_does_not_begin(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 0, 1))
    monkeypatch.setattr("moesurgeon.pipeline.healing_text.read_text", pytest.fail)
    spec = PruneSpec(stages=(7,), heal=HealSpec(traces=("builtin:json",)))
    with pytest.raises(OutputError, match="has 1 free"):
        prune(BUILTIN[0], spec, Writing(output=out))
