"""What a recovery reports: use of experts, shares of the gap with intervals, logs, and the memory it will take."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moesurgeon.engine.device import Placement
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.errors import OutputError, UsageError
from moesurgeon.evaluation.measure import Measurement
from moesurgeon.recovery.closed import closed
from moesurgeon.recovery.estimator import learning_routers
from moesurgeon.recovery.judge import Judge
from moesurgeon.recovery.log import Log, check_log, flat
from moesurgeon.recovery.memory import resident_bytes
from moesurgeon.recovery.monitor import changed_experts, usage_of
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.result import Recovered
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.surgery.anatomy import Anatomy
from tests.engine.small import batches_for, corpus_of, random_windows, running, saved, small_model

# ---- use of experts ----


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return saved(small_model("mixtral", num_hidden_layers=2), tmp_path_factory.mktemp("model") / "model").anatomy


def test_the_judge_counts_every_choice_of_text(tmp_path: Path) -> None:
    subject = saved(small_model("deepseek_v3"), tmp_path / "model")
    model = running(subject)
    heldout = corpus_of(random_windows("a", count=9, vocabulary=90), random_windows("b", count=3, vocabulary=90))
    with learning_routers(model, subject.anatomy, candidates=None) as learning:
        judgement = Judge(Stream(Source.of_model(model, subject.anatomy)), learning, heldout, 40).judged()
        counts = np.zeros_like(judgement.counts)
        with torch.no_grad():
            for number, batch in enumerate(batches_for(heldout, 40)):
                with learning.recording() as routed:
                    model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False)
                for row, layer in enumerate(routed):
                    for expert in layer.chosen[batch.is_text.flatten()].flatten().tolist():
                        counts[number, row, expert] += 1
    assert np.array_equal(judgement.counts, counts)
    assert judgement.loss == pytest.approx(judgement.sums.sum() / judgement.measured.positions.sum())


def test_usage_is_counted_by_hand(anatomy: Anatomy) -> None:
    counts = np.zeros((2, 2, 8), dtype=np.int64)
    counts[:, 0] = 3  # even
    counts[0, 1, :2] = 6, 10
    counts[1, 1, :2] = 8, 8
    even, lopsided = usage_of(anatomy, counts).values()
    assert even["entropy"] == pytest.approx(1.0) and even["max_over_mean"] == 1.0 and even["dead"] == []
    assert set(even["overflow"].values()) == {0.0}
    share = np.array([14, 18]) / 32
    assert lopsided["entropy"] == pytest.approx(-(share * np.log(share)).sum() / np.log(8))
    assert lopsided["max_over_mean"] == 8 * 18 / 32 and lopsided["dead"] == [2, 3, 4, 5, 6, 7]
    assert lopsided["least"] == 0.0
    # 16 choices a batch over 8 experts: 2, 3 (2.5) and 4 places.
    assert lopsided["overflow"] == {
        "1": (4 + 8 + 6 + 6) / 32, "1.25": (3 + 7 + 5 + 5) / 32, "2": (2 + 6 + 4 + 4) / 32,
    }  # fmt: skip


def test_an_expert_has_changed_if_its_share_did(anatomy: Anatomy) -> None:
    teachers = np.zeros((1, 2, 10), dtype=np.int64)
    teachers[0, :, :8], teachers[0, :, 8:] = 10, 10
    mine = np.full((1, 2, 8), 10, dtype=np.int64)  # of 80, where the teacher's had 10 of 100
    experts = {0: range(8), 1: (8, 9, 2, 3, 4, 5, 6, 7)}
    assert changed_experts(anatomy, mine, teachers, experts, 0.3) == {0: frozenset(), 1: frozenset()}
    assert changed_experts(anatomy, mine, teachers, experts, 0.2)[1] == frozenset(range(8))
    mine[0, 1, 3] = 30
    assert changed_experts(anatomy, mine, teachers, experts, 0.3) == {0: frozenset(), 1: frozenset({3})}


# ---- shares of the gap ----


def _measured(domain: list[int], document: list[int], positions: list[int]) -> Measurement:
    buckets = np.zeros((len(domain), 1, 6))
    buckets[:, 0, 5] = positions
    return Measurement(("a", "b"), np.array(domain), np.array(document), buckets, 1.0, sum(positions), False)


def test_the_gap_is_that_to_the_teacher_by_domain_and_document() -> None:
    like = _measured([0, 0, 0, 1, 1], [0, 0, 1, 0, 1], [10, 10, 20, 5, 5])
    before = np.array([30.0, 30.0, 60.0, 10.0, 10.0])
    teacher = np.array([20.0, 20.0, 40.0, 10.0, 10.0])
    after = np.array([25.0, 25.0, 45.0, 11.0, 9.0])
    report = closed(like, before, after, teacher)
    assert report["gap_closed"] == pytest.approx((140 - 115) / (140 - 100))
    assert report["loss_before"] == 140 / 50 and report["teacher_loss"] == 100 / 50
    a, b = report["domains"]["a"], report["domains"]["b"]
    assert a["gap_closed"] == pytest.approx(25 / 40) and a["documents"] == 2
    # Two documents that closed 10 of 20 and 15 of 20: the resamples lie between.
    assert a["interval"] == pytest.approx([0.5, 0.75])
    assert b["gap_closed"] is None and b["interval"] is None


def test_a_gap_that_is_not_sure_has_no_interval() -> None:
    like = _measured([0, 0], [0, 1], [10, 10])
    report = closed(like, np.array([30.0, 20.0]), np.array([25.0, 20.0]), np.array([20.0, 25.0]))
    assert report["gap_closed"] == 1.0 and report["interval"] is None


def test_a_report_holds_no_tensors() -> None:
    figures = {"loss_before": 3.0, "loss_after": 2.0, "teacher_loss": 1.0, "gap_closed": 0.5, "interval": None}
    recovered = Recovered({"w": torch.zeros(2)}, {**figures, "domains": {}}, 0.5, 7, 1, log=[{"step": 1}])
    report = recovered.as_dict()
    assert json.loads(json.dumps(report)) == report
    assert {name: report[name] for name in figures} == figures
    assert report["trained_parameters"] == 7 and report["gradient_norm"] == 0.5


# ---- logs ----

ENTRIES = [
    {"step": 2, "loss": 0.5, "usage": {"0": {"entropy": 0.9, "dead": [1, 2], "overflow": {"1.25": 0.1}}}},
    {"step": 4, "loss": 0.25, "usage": {"0": {"entropy": 0.8, "dead": [], "overflow": {"1.25": 0.2}}}},
]


def test_a_csv_log_has_a_line_for_every_look(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.csv")
    log.write(ENTRIES[:1])
    log.write(ENTRIES)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert rows[1]["usage.0.entropy"] == "0.8" and rows[0]["usage.0.dead"] == "2"
    assert rows[0]["usage.0.overflow.1.25"] == "0.1"
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_json_log_is_the_entries(tmp_path: Path) -> None:
    Log(tmp_path / "log.json").write(ENTRIES)
    assert json.loads((tmp_path / "log.json").read_text()) == ENTRIES


def test_tensorboard_is_told_of_every_entry_once(tmp_path: Path) -> None:
    log = Log(tensorboard=tmp_path)
    log.write(ENTRIES[:1])
    log.write(ENTRIES)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["loss"] == [(2, 0.5), (4, 0.25)]
    assert [step for step, _value in scalars["usage/0/entropy"]] == [2, 4]


def test_logs_that_could_not_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_log(None, None)
    check_log(tmp_path / "log.csv", None)
    with pytest.raises(UsageError, match=r"says no format; name it something.csv or something.json"):
        check_log(tmp_path / "log.txt", None)
    with pytest.raises(UsageError, match="there is no folder"):
        check_log(tmp_path / "nowhere" / "log.csv", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="--tensorboard needs the package tensorboard: pip install"):
        check_log(None, tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match="the log could not be written"):
        Log(tmp_path / "folder.csv").write(ENTRIES)


def test_flat_numbers_have_dotted_names() -> None:
    assert flat(ENTRIES[0])["usage.0.overflow.1.25"] == 0.1


# ---- memory ----


def test_memory_is_that_of_weights_and_what_is_trained(anatomy: Anatomy) -> None:
    float32, bfloat16 = (Placement(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16))
    small = Schedule(tokens_per_step=8, candidates=2, rank=1)

    def needed(*adapt: str, placement: Placement = float32, schedule: Schedule = small) -> int:
        takes = resident_bytes(anatomy, placement, adapt, Losses(), schedule)
        return takes.always + takes.work

    routers = needed("routers")
    assert needed("full-routers") - routers == 16 * 2 * (8 * 32 - (8 + 32))  # 2 layers, 8 experts, 32 wide
    matrices = 2 * 8 * 32 * 24
    both = needed("routers", "experts") - routers
    assert both == 16 * 2 * 8 * (32 + 24) + 2 * 4 * matrices
    assert needed("routers", placement=bfloat16) < routers
    assert needed("routers", schedule=Schedule(tokens_per_step=16, candidates=2, rank=1)) > routers
    longer = Schedule(tokens_per_step=4096, rank=1)
    assert needed("routers", schedule=Schedule(tokens_per_step=4096, rank=1, recompute=True)) < needed(
        "routers", schedule=longer
    )
