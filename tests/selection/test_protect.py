"""Who is protected by what, against the definitions written out, and that protection is respected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesurgeon.errors import ProfileError, UsageError
from moesurgeon.pipeline.choice import choose_by
from moesurgeon.pipeline.prune_spec import PruneSpec
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.profiling.artefact import Profile
from moesurgeon.profiling.statistics import Statistics
from moesurgeon.profiling.uncertainty import SUPPORT
from moesurgeon.selection.criteria import CRITERIA
from moesurgeon.selection.protect import claims_of
from tests.families.conftest import Stock, stock
from tests.profiling.made import profile_of, random_documents, statistics_of

__all__ = ["stock"]

LAYERS, EXPERTS, TOP_K = (1, 2, 3), 8, 2


def _profile(seed: int = 0, concentration: float = 3.0) -> Profile:
    """Three domains in which layers use their experts very differently, long context and first choices among them."""
    random = np.random.default_rng(seed)
    documents = []
    for domain in ("code", "chat", "few"):
        share = random.dirichlet(np.full(EXPERTS, 0.7), size=len(LAYERS))
        count = 2 if domain == "few" else 12
        documents += random_documents(
            random, share, count, domain=domain, concentration=concentration, top_k=TOP_K, length=100
        )
    documents = [replace(each, scale=random.uniform(0.5, 2.0, each.tokens.shape)) for each in documents]
    statistics = replace(statistics_of(documents, top_k=TOP_K), layers=LAYERS)
    sums = statistics.sums
    for name in ("tokens", "weighted_norm"):  # beyond position 512, and beyond 2048
        for bucket in (1, 2):
            sums[name][:, bucket] = sums[name][:, 0] * random.uniform(0, 1, sums[name][:, 0].shape)
    sums["first_choice"][:, 0] = np.floor(sums["tokens"][:, 0] * random.uniform(0, 1, sums["tokens"][:, 0].shape))
    return profile_of(statistics)


def _by_definition(profile: Profile, name: str, share: float) -> np.ndarray:
    """Who is protected [L, E], expert by expert."""
    statistics = profile.statistics
    held = np.zeros((len(LAYERS), EXPERTS), dtype=bool)
    domain = statistics.domains.index(name) if name in statistics.domains else None
    for row in range(len(LAYERS)):
        if name == "low-support":
            held[row] = [statistics.sums["tokens"][:, :, row, e].sum() < SUPPORT for e in range(EXPERTS)]
            continue
        if name == "first-choice":
            counts = [statistics.sums["first_choice"][:, :, row, e].sum() for e in range(EXPERTS)]
            held[row] = [count >= share * sum(counts) for count in counts]
            continue
        place = (domain, slice(None)) if domain is not None else (slice(None), slice(1, None))
        tokens = [statistics.sums["tokens"][*place, row, e].sum() for e in range(EXPERTS)]
        norms = [statistics.sums["weighted_norm"][*place, row, e].sum() for e in range(EXPERTS)]
        reap = {e: norms[e] / tokens[e] for e in range(EXPERTS) if tokens[e] >= SUPPORT}
        best = sorted(reap, key=lambda e: -reap[e])[:TOP_K]
        held[row] = [tokens[e] >= share * sum(tokens) or e in best for e in range(EXPERTS)]
    return held


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["code", "chat", "few", "long-context", "first-choice", "low-support"])
def test_who_is_protected(name: str, seed: int) -> None:
    profile = _profile(seed)
    default = claims_of(profile, (name,))
    assert (default.held[0] == _by_definition(profile, name, 2 / EXPERTS)).all()
    if name == "low-support":
        assert np.isnan(default.asked[0])
        return
    assert default.asked[0] == 2 / EXPERTS
    for share in (0.05, 0.9):
        found = claims_of(profile, (f"{name}={share}",))
        assert (found.held[0] == _by_definition(profile, name, share)).all()
        assert found.names == (name,) and found.asked[0] == share
    assert claims_of(profile, (f"{name}=0.05",)).held.sum() > default.held.sum()


def test_a_domain_of_that_name_wins() -> None:
    profile = _profile()
    statistics = replace(profile.statistics, domains=("first-choice", "low-support", "a=b"))
    profile = replace(profile, statistics=statistics)
    for number, name in enumerate(statistics.domains):
        expected = statistics.by_domain("tokens")[number]
        share = claims_of(profile, (name,)).share[0]
        np.testing.assert_allclose(share, expected / expected.sum(axis=1, keepdims=True))
        assert claims_of(profile, (f"{name}=0.3",)).names == (name,)


def test_weights_count_across_domains_and_not_within_one() -> None:
    plain = _profile()
    weighted = replace(plain, origin=replace(plain.origin, weights={"chat": 0.0}))
    assert (claims_of(weighted, ("chat",)).share == claims_of(plain, ("chat",)).share).all()
    long = weighted.statistics.sums["tokens"][[0, 2], 1:].sum(axis=(0, 1))
    share = claims_of(weighted, ("long-context",)).share[0]
    np.testing.assert_allclose(share, long / long.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            ("prose",),
            "the profile has no domain 'prose', only code, chat, few; long-context, first-choice, low-support",
        ),
        (("code=much",), "'much' is no share of code's traffic"),
        (("code=0",), "'0' is no share"),
        (("code=1.5",), "'1.5' is no share"),
        (("code=nan",), "'nan' is no share"),
        (("code", "code=0.5"), "names code twice"),
        (("low-support=0.5",), "takes no share"),
    ],
)
def test_what_cannot_be_protected(asked: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        claims_of(_profile(), asked)


def test_what_the_profile_does_not_hold() -> None:
    statistics = statistics_of(random_documents(np.random.default_rng(0), np.full((3, 8), 1 / 8), 8, top_k=2), top_k=2)
    statistics = replace(statistics, layers=LAYERS)
    with pytest.raises(ProfileError, match=r"no text beyond position 511, .* a larger --length"):
        claims_of(profile_of(statistics), ("long-context",))
    short = statistics_of(random_documents(np.random.default_rng(0), np.full((3, 8), 1 / 8), 1, length=20))
    assert "rests on" in claims_of(profile_of(short), ("text",)).warnings[0]
    counts = Statistics.empty(("served",), LAYERS, 8, 2)
    counts.sums["tokens"][0, 0] = statistics.total("tokens")
    counts.sums["seen"][0, 0] = 1000
    served = profile_of(counts)
    for name in ("long-context", "first-choice"):
        with pytest.raises(ProfileError, match=f"token counts only, which say nothing of {name}"):
            claims_of(served, (name,))
    share = statistics.total("tokens") / statistics.total("tokens").sum(axis=1, keepdims=True)
    found = claims_of(served, ("served=0.13", "low-support"))
    assert (found.held[0] == (share >= 0.13)).all() and found.held[0].any()  # by traffic alone
    assert not found.held[1].any()


@pytest.fixture(scope="module")
def models(stock: Stock) -> dict[int, Subject]:
    """One without routing groups, one with two; both with 8 experts, top-2, in layers 1 to 3."""
    return {1: open_subject(str(stock("deepseek"))), 2: open_subject(str(stock("deepseek_v3")))}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("groups", "virtual"), [(1, False), (2, False), (2, True)])
def test_nothing_protected_goes_without_a_word(
    criterion: str, virtual: bool, groups: int, models: dict[int, Subject]
) -> None:
    anatomy = models[groups].anatomy
    gave_way = stayed = changed = 0
    for seed, keep in [(seed, keep) for seed in range(4) for keep in (4, 6)]:
        profile = _profile(seed)
        names = ("code=0.3", "few", "low-support")
        spec = PruneSpec(keep=keep, criterion=criterion, protect=names, virtual=virtual, seed=seed)
        choice = choose_by(anatomy, spec, profile)
        free = choose_by(anatomy, replace(spec, protect=()), profile)
        claims = claims_of(profile, names)
        said = choice.evidence["protection"]
        assert said["names"] == {"code": 0.3, "few": 0.25, "low-support": None}
        assert choice.record["protect"] == said["names"] and "protect" not in free.record
        went = 0
        for row, layer in enumerate(LAYERS):
            kept, found = set(choice.kept[layer]), said["layers"][str(layer)]
            protected = set(np.flatnonzero(claims.protected[row]).tolist())
            assert {claim["expert"] for claim in found["protected"]} == protected
            for claim in found["protected"]:
                by = {
                    name for name, held in zip(claims.names, claims.held[:, row, claim["expert"]], strict=True) if held
                }
                assert set(claim["by"]) == by
                assert claim["share"] == claims.share[claims.names.index(claim["by"][0]), row, claim["expert"]]
            assert found["went"] == sorted(protected - kept)
            assert found["kept_instead"] == sorted(kept - set(free.kept[layer]))
            assert found["dropped_instead"] == sorted(set(free.kept[layer]) - kept)
            went += len(found["went"])
            changed += len(found["kept_instead"])
            if virtual:
                continue
            assert len(kept) == keep
            for group in range(groups):
                mine = set(range(group * 8 // groups, (group + 1) * 8 // groups))
                assert len(kept & mine) == keep // groups
                # All of them stay where there is room; where not, only those, the strongest.
                own = protected & mine
                if len(own) <= keep // groups:
                    assert own <= kept
                else:
                    assert kept & mine <= own
                    strength = claims.strength[row]
                    assert min(strength[list(kept & mine)]) >= max(strength[list(own - kept)])
        warned = [warning for warning in choice.warnings if "protected experts go all the same" in warning]
        assert len(warned) == (went > 0)
        if virtual:
            assert sum(map(len, choice.kept.values())) == keep * len(LAYERS)
            if went:  # nobody that is not protected could have gone instead
                for row, layer in enumerate(LAYERS):
                    for group in range(2):
                        mine = set(choice.kept[layer]) & set(range(group * 4, group * 4 + 4))
                        assert len(mine) == 2 or mine <= set(np.flatnonzero(claims.protected[row]).tolist())
        gave_way, stayed = gave_way + went, stayed + int(claims.protected.sum()) - went
    assert gave_way and stayed and changed


def test_the_rule_of_a_share_spares_who_is_protected(models: dict[int, Subject]) -> None:
    """``--below``: what is protected is not cold, so that nobody else goes for it."""
    anatomy, profile = models[1].anatomy, _profile(1)
    spec = PruneSpec(below=0.2)
    bare = choose_by(anatomy, spec, profile, dry_run=True)
    kept = choose_by(anatomy, replace(spec, protect=("few", "low-support")), profile, dry_run=True)
    assert kept.evidence["candidates"]["count"] < bare.evidence["candidates"]["count"]
    claims = claims_of(profile, ("few", "low-support"))
    for row, layer in enumerate(LAYERS):
        for expert in kept.evidence["candidates"]["layers"][str(layer)]:
            assert expert["protected"] == claims.protected[row, expert["expert"]]
        assert not kept.evidence["protection"]["layers"][str(layer)]["went"]
