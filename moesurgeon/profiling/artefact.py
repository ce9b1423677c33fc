"""The profile on disk: a folder with the sums (safetensors) and where they are from (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import moesurgeon
from moesurgeon.checkpoint.faults import safetensors_errors
from moesurgeon.checkpoint.header import read_header
from moesurgeon.checkpoint.replaceable import Contents, Kind
from moesurgeon.checkpoint.staging import staged
from moesurgeon.checkpoint.strict_json import parse_strictly
from moesurgeon.errors import CheckpointError, ProfileError
from moesurgeon.profiling.inner import NAME as INNER
from moesurgeon.profiling.inner import Inner
from moesurgeon.profiling.latency_facts import checked_latency, latency_summary
from moesurgeon.profiling.statistics import Statistics, shapes_of
from moesurgeon.profiling.summary import summary_of

SCHEMA = 2
_SUMS = "stats.safetensors"
FACTS = "profile.json"
PROFILE = Kind("a profile", FACTS, ("schema_version",), Contents(files=(_SUMS, FACTS, INNER)), has=(_SUMS,))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a profile is from: the checkpoint's fingerprint, the text, and how it was run."""

    fingerprint: str
    family: str
    splits: dict[str, str]
    trace_hashes: dict[str, str]
    length: int
    placement: str
    transformers: str
    weights: dict[str, float] = field(default_factory=dict)
    """By domain, what its tokens count in decisions; one where it is not named. The sums are without them."""
    sample: int | None = None
    """The seed by which documents were sampled; None: the first ones were read."""
    chat_template: str | None = None
    """sha256 of the template that made text of chats; None where there was none, or no chat."""


@dataclass(frozen=True)
class Profile:
    """Statistics and where they are from; ``inner`` and ``latency`` where they were asked for."""

    statistics: Statistics
    origin: Origin
    inner: Inner | None = None
    latency: Mapping[str, Any] | None = None

    @property
    def weighted(self) -> Statistics:
        """The statistics with the weights of the domains: what every choice of experts is made on."""
        return self.statistics.weighted(self.origin.weights)

    def summary(self) -> dict[str, Any]:
        """Return what ``profile --json`` reports: tokens, domains, and figures per layer."""
        report = {**summary_of(self.statistics), **asdict(self.origin)}
        if self.inner:
            report["inner"] = {"tokens": self.inner.shape.tokens, "experts": self.inner.shape.kept}
        if self.latency:
            report["latency"] = latency_summary(self.latency, self.statistics)
        return report


def save_profile(profile: Profile, folder: Path, *, overwrite: bool = False) -> None:
    """Write ``profile`` to the new folder ``folder``, whole or not at all."""
    from safetensors.numpy import save_file

    statistics = profile.statistics
    facts = {
        "schema_version": SCHEMA,
        "moesurgeon": moesurgeon.__version__,
        "origin": asdict(profile.origin),
        "domains": list(statistics.domains),
        "layers": list(statistics.layers),
        "experts": statistics.experts,
        "top_k": statistics.top_k,
    }
    if profile.inner:
        facts["inner"] = profile.inner.facts()
    if profile.latency:
        facts["latency"] = profile.latency
    with staged(folder, PROFILE, overwrite=overwrite) as staging:
        with safetensors_errors(staging / _SUMS):
            save_file(statistics.sums, staging / _SUMS)
        (staging / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if profile.inner:
            profile.inner.put_into(staging)


def load_profile(folder: Path) -> Profile:
    """Read the profile in ``folder``; ProfileError if it is missing, damaged or of another version."""
    from safetensors.numpy import load_file

    if not (folder / FACTS).is_file() or not (folder / _SUMS).is_file():
        raise ProfileError(f"{folder} is no profile: it lacks {FACTS} or {_SUMS}; make one with moesurgeon profile")
    try:
        facts = parse_strictly((folder / FACTS).read_text(encoding="utf-8"))
        if facts.get("schema_version") != SCHEMA:
            raise ProfileError(
                f"{folder} has schema version {facts.get('schema_version')}, not {SCHEMA}; profile again"
            )
        read_header(folder / _SUMS, _SUMS)  # refuses what does not fit the file before numpy sees it
        arrays = load_file(folder / _SUMS)
        statistics = Statistics(
            tuple(facts["domains"]),
            tuple(facts["layers"]),
            facts["experts"],
            facts["top_k"],
            arrays,
        )
        profile = Profile(
            statistics,
            Origin(**facts["origin"]),
            Inner.of_profile(folder, facts),
            checked_latency(facts.get("latency"), statistics.layers),
        )
        numbers = [statistics.experts, statistics.top_k, *statistics.layers]
        if not all(type(number) is int for number in numbers):  # true would be 1
            raise TypeError("numbers")
        if not all(type(name) is str for name in statistics.domains):
            raise TypeError("domains")
        weights = profile.origin.weights.values()
        if not all(type(weight) in (int, float) and 0 <= weight < float("inf") for weight in weights):
            raise ValueError("weights")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        why = str(error)[:120] if "comes twice" in str(error) else type(error).__name__
        raise ProfileError(f"{folder} is damaged ({why}); make it again with moesurgeon profile") from error
    expected = shapes_of(len(statistics.domains), len(statistics.layers), statistics.experts, statistics.top_k)
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
            raise ProfileError(f"{folder} is damaged ({name}); make it again with moesurgeon profile")
    return profile
