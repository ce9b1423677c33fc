"""Several profiles of one checkpoint as one: of other text, or of the shares of several machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from moesurgeon.errors import ProfileError
from moesurgeon.profiling.artefact import Origin, Profile
from moesurgeon.profiling.latency_facts import merged_latency


def merged_profiles(parts: Sequence[tuple[Path, Profile]]) -> tuple[Profile, list[str]]:
    """Return the profile of all texts together and notes on what it lacks; ProfileError if they cannot be added up.

    The same documents must not be in two of them: they would count twice, and pass for surer than they are. What
    can be told is the same text, by its hash, under one name or two. Inner products are of each profile's own
    tokens, and are left out.
    """
    first = parts[0]
    for part in parts[1:]:
        _refuse_other(*first, *part)
    origin = reduce(_joined, ((path, profile.origin) for path, profile in parts[1:]), first[1].origin)
    statistics = reduce(lambda sum_, part: sum_.merged(part[1].statistics), parts[1:], first[1].statistics)
    latency, notes = first[1].latency, []
    for _path, profile in parts[1:]:
        latency, note = merged_latency(latency, profile.latency)
        notes += [note] if note else []
    if any(profile.inner for _path, profile in parts):
        notes.append("inner products are not merged: the merged profile has none")
    return Profile(statistics, origin, latency=latency), notes


def _refuse_other(path: Path, profile: Profile, other_path: Path, other: Profile) -> None:
    if profile.origin.fingerprint != other.origin.fingerprint:
        raise ProfileError(
            f"{path} and {other_path} were taken from different checkpoints; compare them with profile diff"
        )
    if profile.statistics.counts_only != other.statistics.counts_only:
        imported = path if profile.statistics.counts_only else other_path
        raise ProfileError(f"{imported} holds a server's token counts only; merge it with others of its kind")
    if profile.origin.length != other.origin.length:
        raise ProfileError(
            f"{path} has windows of {profile.origin.length} tokens, {other_path} of {other.origin.length}; "
            "profile again with the same --length"
        )


def _joined(origin: Origin, part: tuple[Path, Origin]) -> Origin:
    """Return where both are from; ProfileError if domains of one name do not fit together."""
    path, other = part
    for domain in origin.splits.keys() & other.splits.keys():
        one, two = origin.splits[domain], other.splits[domain]
        if one != two:
            raise ProfileError(
                f"{path} has the {two} split of {domain}, the others its {one} split; give the domains other names"
            )
        if origin.weights.get(domain, 1.0) != other.weights.get(domain, 1.0):
            raise ProfileError(f"{path} gives {domain} another weight than the others; profile it with the same one")
        hashes = origin.trace_hashes[domain].split("+")
        if set(hashes) & set(other.trace_hashes[domain].split("+")):
            raise ProfileError(f"{path} holds the same text of {domain} as the others; it would count twice")
    for domain, digest in other.trace_hashes.items():
        for name, digests in origin.trace_hashes.items():
            if set(digests.split("+")) & set(digest.split("+")):
                raise ProfileError(
                    f"{path} has under {domain} the text that the others have under {name}; it would count twice: "
                    "leave one of the two out"
                )
    hashes_of = dict(origin.trace_hashes)
    for domain, digest in other.trace_hashes.items():
        known = hashes_of.get(domain, "").split("+")
        hashes_of[domain] = "+".join(sorted({*filter(None, known), *digest.split("+")}))
    return replace(
        origin,
        splits={**other.splits, **origin.splits},
        trace_hashes=hashes_of,
        weights={**other.weights, **origin.weights},
        sample=other.sample if origin.sample is None else origin.sample,
        chat_template=other.chat_template if origin.chat_template is None else origin.chat_template,
        placement=_list(origin.placement, other.placement),
        transformers=_list(origin.transformers, other.transformers),
    )


def _list(one: str, other: str) -> str:
    return ", ".join(sorted({*one.split(", "), *other.split(", ")}))
