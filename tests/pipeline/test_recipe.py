"""Recipes: what YAML stands for, and that commands and recipes fill the same objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesurgeon.errors import InputError
from moesurgeon.healing.pace import Pace
from moesurgeon.pipeline.options import HealSpec, Running, SampleSpec
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.recipe import Recipe, RecoverStep, RetopStep
from moesurgeon.pipeline.recipe_file import read_recipe
from moesurgeon.pipeline.text_roles import RoleText
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.surgery.retop import RetopSpec

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def _read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    recipe = _read(
        tmp_path,
        """
        checkpoint: hf://org/name
        text: {traces: [a.jsonl, code=b.txt], split: calibration, max_tokens: 1000, length: 128}
        running: {device: cpu, dtype: float32}
        report_tokens: 2000
        steps:
          - sample: {tokens: 2000, length: 32, rows: 8, temperature: 0.9, seed: 4}
          - sample: {uniform: true}
          - retop: {top_k: 2, heal: {method: ridge, traces: [heal.txt], max_tokens: 900, length: 64, teacher: t}}
          - profile: {max_tokens: 3000}
          - prune: {keep: 6, criterion: ean, seed: 3, heal: {heldout_tokens: 800, pace: {steps: 9, router: true}}}
          - prune: {keep_experts: kept.json}
          - profile:
          - prune: {ratio: 0.1, protect: [code=0.3, low-support], virtual: true}
          - recover:
              adapt: [full-routers, experts]
              changed: 0.1
              losses: {objective: lm, balance: 0.5, temperature: 2.0, router: 0.1, hidden: 0.2, z: 0.3}
              schedule: {steps: 5, tokens_per_step: 64, learning_rate: 1.0e-4, rank: 2, judge_every: 2, seed: 1,
                patience: 3, capacity: 1.25, recompute: true, expert_rate: 0.5, warmup: 0.1, clip: 2.0}
              log: steps.csv
              max_tokens: 4000
              heldout_tokens: 500
              allow_noop: true
        """,
    )
    assert recipe.checkpoint == "hf://org/name"
    assert recipe.text == RoleText(
        traces=(f"{tmp_path}/a.jsonl", f"code={tmp_path}/b.txt"), split="calibration", max_tokens=1000, length=128
    )
    assert recipe.running == Running(device="cpu", dtype="float32")
    assert recipe.report_tokens == 2000
    assert [step.name for step in recipe.steps[:2]] == ["sample", "sample"]
    assert recipe.steps[0].sample == SampleSpec(tokens=2000, length=32, rows=8, temperature=0.9, seed=4)
    assert recipe.steps[1].sample == SampleSpec(uniform=True)
    steps = recipe.steps[2:]
    assert [step.writes for step in recipe.steps[:4]] == [False, False, True, False]
    assert [step.name for step in steps] == [
        "retop", "profile", "prune", "prune", "profile", "prune", "recover"
    ]  # fmt: skip
    assert steps[0].retop is not None and steps[0].retop.spec == RetopSpec(top_k=2)
    healed_on = {"traces": (f"{tmp_path}/heal.txt",), "teacher": f"{tmp_path}/t"}
    heal = HealSpec(method="ridge", max_tokens=900, length=64, **healed_on)  # type: ignore[arg-type]
    assert steps[0].heal == heal
    distill = HealSpec(heldout_tokens=800, pace=Pace(steps=9, router=True))
    assert steps[2].prune == PruneSpec(keep=6, criterion="ean", seed=3, heal=distill)
    assert steps[2].heal == distill and [step.heal for step in steps[3:]] == [None] * 4
    assert steps[3].prune == PruneSpec(keep_experts=tmp_path / "kept.json")
    assert steps[5].prune == PruneSpec(ratio=0.1, protect=("code=0.3", "low-support"), virtual=True)
    recover = steps[6].recover
    assert recover is not None
    assert recover.losses == Losses(objective="lm", balance=0.5, temperature=2.0, router=0.1, hidden=0.2, z=0.3)
    assert (recover.adapt, recover.changed, recover.log) == (("full-routers", "experts"), 0.1, tmp_path / "steps.csv")
    assert recover.schedule == Schedule(
        steps=5, tokens_per_step=64, learning_rate=1e-4, rank=2, judge_every=2, candidates=None, seed=1, patience=3,
        capacity=1.25, recompute=True, expert_rate=0.5, warmup=0.1, clip=2.0,
    )  # fmt: skip
    assert (recover.max_tokens, recover.heldout_tokens, recover.allow_noop) == (4000, 500, True)


def test_nothing_said_is_the_defaults(tmp_path: Path) -> None:
    bare = _read(tmp_path, "checkpoint: c\nsteps:\n  - retop:\n  - profile:\n  - recover:\n")
    empty = _read(tmp_path, "checkpoint: c\nsteps: [{retop: {}}, {profile: {}}, {recover: {}}]")
    assert bare == empty
    assert bare.text == RoleText() and bare.running == Running()
    assert bare.steps[0].retop == RetopStep() and RetopStep().spec == RetopSpec()
    assert bare.steps[2].recover == RecoverStep()


def test_a_recipe_does_not_change(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "checkpoint: c\nsteps: [{retop: {}}]")
    with pytest.raises(ValueError, match="frozen"):
        recipe.checkpoint = "other"


@pytest.mark.parametrize(
    ("steps", "is_fine"),
    [
        ("{profile: {}}, {prune: {keep: 6}}", True),
        ("{prune: {keep: 6, profile: p}}", True),
        ("{prune: {keep_experts: k.json}}", True),
        ("{prune: {keep: 6}}", False),
        ("{profile: {}}, {retop: {}}, {prune: {keep: 6}}", False),  # of the checkpoint before the retop
        ("{profile: {}}, {prune: {keep: 6}}, {prune: {keep: 5}}", False),
        ("{profile: {}}, {prune: {keep: 6}}, {profile: {}}, {prune: {keep: 5}}", True),
    ],
)
def test_prune_has_a_profile_of_what_it_cuts(steps: str, is_fine: bool, tmp_path: Path) -> None:
    text = f"checkpoint: c\nsteps: [{steps}]"
    if is_fine:
        _read(tmp_path, text)
    else:
        with pytest.raises(InputError, match="put a profile step before it"):
            _read(tmp_path, text)


@pytest.mark.parametrize("prune", ["{keep: 6, criterion: reconstruction}", "{keep: 6, curve: true}"])
def test_subsets_need_inner_products(prune: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile: \{inner: 4096\}"):
        _read(tmp_path, f"checkpoint: c\nsteps: [{{profile: {{}}}}, {{prune: {prune}}}]")
    recipe = _read(tmp_path, f"checkpoint: c\nsteps: [{{profile: {{inner: 64}}}}, {{prune: {prune}}}]")
    assert recipe.steps[0].profile is not None and recipe.steps[0].profile.inner == 64


def test_error_names_the_file_and_the_place(tmp_path: Path) -> None:
    says = r"recipe\.yaml, line 2, column 44: steps\.1\.recover\.schedule\.stepz: .*no such key; did you mean steps\?"
    with pytest.raises(InputError, match=says):
        _read(tmp_path, "checkpoint: c\nsteps: [{retop: {}}, {recover: {schedule: {stepz: 1}}}]")


@pytest.mark.parametrize(
    ("heal", "says"),
    [
        ("{method: magic}", r"steps\.0\.retop\.heal\.method: input should be 'none', 'scale', 'ridge' or 'distill'"),
        ("{pace: {steps: 0}}", r"steps\.0\.retop\.heal\.pace\.steps: "),
        ("{split: validation}", r"steps\.0\.retop\.heal\.split: input should be 'train' or 'calibration'"),
        ("{sample: -1}", r"steps\.0\.retop\.heal\.sample: "),
        ("{max_tokens: 7}", r"steps\.0\.retop\.heal\.max_tokens: "),
        ("{step: 7}", r"steps\.0\.retop\.heal\.step: there is no such key"),
    ],
)
def test_healing_that_cannot_be(heal: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        _read(tmp_path, f"checkpoint: c\nsteps: [{{retop: {{heal: {heal}}}}}]")


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("{sample: {}}, {retop: {}}", "nothing heals on what sample writes"),
        ("{retop: {heal: {}}}, {sample: {}}", "nothing heals on what sample writes"),
        ("{sample: {}}, {sample: {seed: 1}}, {retop: {heal: {}}}", "two samples of the kind own"),
        ("{sample: {tokens: 3}}, {retop: {heal: {}}}", r"steps\.0\.sample\.tokens"),
        ("{profile: {}}, {sample: {}}, {prune: {keep: 6, heal: {}}}", None),  # the profile is as good as before
    ],
)
def test_what_is_sampled_is_for_healing(steps: str, says: str | None, tmp_path: Path) -> None:
    text = f"checkpoint: c\nsteps: [{steps}]"
    if says is None:
        _read(tmp_path, text)
    else:
        with pytest.raises(InputError, match=says):
            _read(tmp_path, text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_that_come_along(path: Path) -> None:
    read_recipe(path)


def test_retop_can_name_a_profile(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "checkpoint: c\nsteps: [{retop: {top_k: 1, profile: p}}, {retop: {}}]")
    first, second = (step.retop for step in recipe.steps)
    assert first is not None and first.profile == tmp_path / "p" and first.spec.top_k == 1
    assert second is not None and second.profile is None
