"""Statistics of documents that are given as numbers: what a walk would have counted, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesurgeon.profiling.artefact import Origin, Profile
from moesurgeon.profiling.statistics import CLUSTERED, FOLDS, Statistics


@dataclass(frozen=True)
class Made:
    """A document: ``length`` tokens of text, and by layer and expert the routed ``tokens`` and sums of the rest."""

    domain: str
    length: int
    tokens: np.ndarray  # [L, E]
    fold: int = 0
    scale: np.ndarray | float = 1.0  # what w, |f| and w |f| of a token are on average

    def sums(self) -> dict[str, np.ndarray]:
        return {name: self.tokens * (1.0 if name == "tokens" else self.scale) for name in CLUSTERED}


def statistics_of(documents: Sequence[Made], top_k: int = 1) -> Statistics:
    """Add up ``documents`` by the definitions of the sums."""
    layers, experts = documents[0].tokens.shape
    domains = tuple(dict.fromkeys(document.domain for document in documents))
    result = Statistics.empty(domains, tuple(range(layers)), experts, top_k)
    sums = result.sums
    for document in documents:
        d = domains.index(document.domain)
        sums["seen"][d, 0] += document.length
        sums["documents"][d] += 1
        sums["documents.squares"][d] += document.length**2
        sums["seen.folds"][d, document.fold % FOLDS] += document.length
        for name, x in document.sums().items():
            sums[name][d, 0] += x
            sums[f"{name}.squares"][d] += x * x
            sums[f"{name}.by_document"][d] += x * document.length
            sums[f"{name}.by_tokens"][d] += x * document.tokens
            sums[f"{name}.folds"][d, document.fold % FOLDS] += x
        sums["first_choice"][d, 0] += document.tokens / top_k
    return result


def random_documents(
    random: np.random.Generator,
    share: np.ndarray,
    count: int,
    *,
    length: int = 200,
    concentration: float = 20.0,
    domain: str = "text",
    top_k: int = 1,
) -> list[Made]:
    """Draw documents whose tokens resemble each other: each has its own shares around ``share`` [L, E]."""
    documents = []
    for number in range(count):
        size = int(random.integers(length // 2, 2 * length))
        own = np.array([random.dirichlet(np.maximum(concentration * row, 1e-3)) for row in share])
        tokens = np.array([random.multinomial(size * top_k, row) for row in own], dtype=float)
        documents.append(Made(domain, size, tokens, fold=number))
    return documents


def profile_of(statistics: Statistics, **origin: object) -> Profile:
    """Put an origin to ``statistics``."""
    said = {
        "fingerprint": "f" * 64,
        "family": "mixtral",
        "splits": dict.fromkeys(statistics.domains, "all"),
        "trace_hashes": {domain: f"{number}" * 64 for number, domain in enumerate(statistics.domains)},
        "length": 512,
        "placement": "cpu float32",
        "transformers": "5",
    }
    return Profile(statistics, Origin(**{**said, **origin}))  # type: ignore[arg-type]
