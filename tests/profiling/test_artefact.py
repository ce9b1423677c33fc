"""The folder of a profile: whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.profiling.artefact import Origin, Profile, load_profile, save_profile
from moesurgeon.profiling.statistics import PEAK, PER_EXPERT, PER_LAYER, Statistics

SUMS, FACTS = "stats.safetensors", "profile.json"


@pytest.fixture
def profile() -> Profile:
    random = np.random.default_rng(0)
    statistics = Statistics.empty(("one", "two"), (1, 3), 4, 2)
    for name in (*PER_EXPERT, PEAK, *PER_LAYER):
        statistics.sums[name][...] = random.integers(1, 50, statistics.sums[name].shape)
    statistics.sums["seen"][:] = 0.0
    statistics.sums["seen"][:, 0] = 30, 50
    for name in (*PER_EXPERT, PEAK):
        statistics.sums[name][:, :, 1, 2] = 0.0  # layer 3 never used expert 2
    origin = Origin(
        fingerprint="f" * 64,
        family="mixtral",
        splits={"one": "report", "two": "all"},
        trace_hashes={"one": "1", "two": "2"},
        length=512,
        placement="cpu float32",
        transformers="5",
    )
    return Profile(statistics, origin)


@pytest.fixture
def folder(profile: Profile, tmp_path: Path) -> Path:
    save_profile(profile, tmp_path / "profile")
    return tmp_path / "profile"


def test_the_summary_is_read_off_the_sums(profile: Profile) -> None:
    summary = profile.summary()
    statistics = profile.statistics
    assert summary["tokens"] == 80
    assert summary["domains"] == {"one": 30, "two": 50}
    assert summary["fingerprint"] == "f" * 64
    assert set(summary["layers"]) == {"1", "3"}
    for row, layer in enumerate(("1", "3")):
        figures = summary["layers"][layer]
        tokens, pulls, weights = (
            [sum(statistics.sums[name][d, p, row, e] for d in range(2) for p in range(5)) for e in range(4)]
            for name in ("tokens", "weighted_norm", "weight")
        )
        share = np.array(tokens) / sum(tokens)
        assert figures["utilization"] == pytest.approx(share)
        assert figures["max_over_mean"] == pytest.approx(max(tokens) / (sum(tokens) / 4))
        assert figures["entropy"] == pytest.approx(-sum(p * np.log(p) for p in share if p) / np.log(4))
        assert figures["gate_mass"] == pytest.approx([weight / 80 for weight in weights])
        assert figures["reap"] == [pytest.approx(p / t) if t else None for p, t in zip(pulls, tokens, strict=True)]
        assert figures["router_entropy"] == pytest.approx(statistics.sums["entropy"][:, :, row].sum() / 80)
        assert figures["router_margin"] == pytest.approx(statistics.sums["margin"][:, :, row].sum() / 80)
        assert figures["never_routed"] == ([] if row == 0 else [2])
    assert summary["layers"]["3"]["reap"][2] is None  # not zero: nothing is known
    assert json.loads(json.dumps(summary)) == summary


def test_a_profile_of_nothing_has_a_summary(profile: Profile) -> None:
    figures = Profile(Statistics.empty(("one",), (0,), 4, 2), profile.origin).summary()["layers"]["0"]
    assert figures["reap"] == [None] * 4
    assert figures["gate_mass"] == [0.0] * 4
    assert figures["utilization"] == [0.25] * 4


def test_an_existing_folder_is_only_replaced_on_request(profile: Profile, folder: Path) -> None:
    before = (folder / FACTS).read_bytes()
    with pytest.raises(UsageError, match="is not empty"):
        save_profile(profile, folder)
    (folder / FACTS).write_bytes(before.replace(b"{", b'{"changed": 1, ', 1))
    save_profile(profile, folder, overwrite=True)
    assert (folder / FACTS).read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["profile"]


def _edit_facts(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        facts.update(changes)
        (folder / FACTS).write_text(json.dumps(facts))

    return edit


def _edit_sums(function: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        arrays = {name: array.copy() for name, array in load_file(folder / SUMS).items()}
        function(arrays)
        save_file(arrays, folder / SUMS)

    return edit


def _cut(folder: Path) -> None:
    (folder / SUMS).write_bytes((folder / SUMS).read_bytes()[:-8])


def _without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.__delitem__(name)


def _put(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.__setitem__(name, value)


def _poison(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(..., np.nan)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no facts": (lambda folder: (folder / FACTS).unlink(), "is no profile"),
    "no sums": (lambda folder: (folder / SUMS).unlink(), "is no profile"),
    "not JSON": (lambda folder: (folder / FACTS).write_text("{"), "is damaged"),
    "not UTF-8": (lambda folder: (folder / FACTS).write_bytes(b"\xff"), "is damaged"),
    "a list": (lambda folder: (folder / FACTS).write_text("[]"), "is damaged"),
    "another version": (_edit_facts(schema_version=99), "schema version 99, not 2"),
    "no version": (_edit_facts(schema_version=None), "schema version None"),
    "no domains": (_edit_facts(domains=None), "is damaged"),
    "fewer domains": (_edit_facts(domains=["one"]), "is damaged"),
    "more experts": (_edit_facts(experts=5), "is damaged"),
    "fewer layers": (_edit_facts(layers=[1]), "is damaged"),
    "an origin that lacks things": (_edit_facts(origin={"length": 8}), "is damaged"),
    "cut off": (_cut, "is damaged"),
    "not safetensors": (lambda folder: (folder / SUMS).write_bytes(b"junk"), "is damaged"),
    "a sum missing": (_edit_sums(_without("weight")), r"is damaged \(weight\)"),
    "seen missing": (_edit_sums(_without("seen")), "is damaged"),
    "seen too short": (_edit_sums(_put("seen", np.zeros(1))), r"is damaged \(seen\)"),
    "seen not a number": (_edit_sums(_poison("seen")), r"is damaged \(seen\)"),
    "another shape": (_edit_sums(_put("entropy", np.zeros((2, 3)))), r"is damaged \(entropy\)"),
    "not a number": (_edit_sums(_poison("norm")), r"is damaged \(norm\)"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_profile_is_refused(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    load_profile(folder)
    damage(folder)
    with pytest.raises(ProfileError, match=says) as raised:
        load_profile(folder)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)


def test_a_folder_that_does_not_exist_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="make one with moesurgeon profile"):
        load_profile(tmp_path / "nowhere")
