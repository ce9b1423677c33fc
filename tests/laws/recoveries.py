"""Small cases of recovery: teachers, students with something to recover, and text that the teacher wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from moesurgeon.checkpoint.reader import ShardReader
from moesurgeon.pipeline import healing_text
from moesurgeon.pipeline.options import Running, Text, Writing
from moesurgeon.pipeline.recover import RecoverSpec, recover
from moesurgeon.pipeline.subject import Subject
from moesurgeon.recovery.schedule import Schedule
from moesurgeon.traces.documents import Split
from moesurgeon.traces.windows import Corpus, Window
from tests.engine.small import VOCABULARY, corpus_of, running, saved, small_model

LENGTH = 32
SHORT = Schedule(steps=2, tokens_per_step=64, judge_every=2)
QUICK = Schedule(steps=4, tokens_per_step=128, judge_every=2, learning_rate=1e-2)


def recovered_to(source: str, teacher: str, output: Path, **changes: Any) -> dict[str, Any]:
    schedule = changes.pop("schedule", SHORT)
    names = ("losses", "adapt", "adapter", "changed", "cache", "log", "save_adapter", "streamed")
    own = {name: changes.pop(name) for name in names if name in changes}
    own.setdefault("adapt", ("routers",))
    spec = RecoverSpec(teacher=teacher, schedule=schedule, **own)
    return recover(source, spec, Text(length=LENGTH), Running(device="cpu"), replace(Writing(output=output), **changes))


@contextmanager
def texts(monkeypatch: pytest.MonkeyPatch, training: Corpus, heldout: Corpus) -> Iterator[None]:
    """Let the pipeline read these corpora in place of traces."""
    corpora: dict[Split, Corpus] = {"calibration": training, "validation": heldout}

    def read(*_given: object, builtin_split: Split, **_named: object) -> Corpus:
        corpus = corpora[builtin_split]
        return replace(corpus, splits=dict.fromkeys(corpus.domains, builtin_split))

    with monkeypatch.context() as patch:
        patch.setattr(healing_text, "read_text", read)
        yield


def random_corpora(subject: Subject) -> tuple[Corpus, Corpus]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, subject.anatomy.config["vocab_size"], (8, LENGTH)).astype(np.int32)
    windows = [Window("text", number, 0, row) for number, row in enumerate(tokens)]
    return corpus_of(windows[:4]), corpus_of(windows[4:])


@dataclass(frozen=True)
class Case:
    """A teacher, a student with other routers and one expert per token, and text that the teacher wrote.

    On its own text nobody is better than the teacher, so a router that routes as the teacher's does
    lowers the loss: the random models have something to recover.
    """

    teacher: Subject
    student: Subject
    training: Corpus
    heldout: Corpus
    objective: str


CASES = {
    "mixtral float32 distill": ("mixtral", {}, torch.float32, "distill"),
    # Raw weights: rounding a router to bfloat16 shows in every token, not only where a choice flips.
    "deepseek bfloat16 lm": ("deepseek_v1", {"first_k_dense_replace": 0}, torch.bfloat16, "lm"),
}


def case_of(of: tuple[str, dict[str, Any], torch.dtype, str], folder: Path) -> Case:
    """Make a case of these: family, changes to its config, dtype, objective."""
    family, changes, dtype, objective = of
    large = small_model(family, num_hidden_layers=2, **changes)
    with torch.no_grad():
        large.lm_head.weight.mul_(3.0)  # surer of the next token, so that there is more to lose
    small = small_model(family, num_hidden_layers=2, num_experts_per_tok=1, **changes)
    small.load_state_dict(large.state_dict())
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.mlp.gate.weight.normal_(0.0, 0.2, generator=random)
    teacher = saved(large.to(dtype), folder / "teacher")
    return Case(
        teacher,
        saved(small.to(dtype), folder / "student"),
        corpus_of(written_by(running(teacher), count=48, seed=1)),
        corpus_of(written_by(running(teacher), count=24, seed=2)),
        objective,
    )


def written_by(model: PreTrainedModel, *, count: int, seed: int) -> list[Window]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = torch.randint(VOCABULARY, (count, 1))
        mask = torch.ones_like(first)
        text = model.generate(
            first, attention_mask=mask, max_new_tokens=LENGTH - 1, do_sample=True, top_k=0, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
    return [Window("text", number, 0, row.numpy().astype(np.int32)) for number, row in enumerate(text)]


def bytes_of(subject: Subject) -> dict[str, bytes]:
    with ShardReader(subject.checkpoint) as reader:
        return {name: reader.read(tensor) for name, tensor in subject.checkpoint.tensors.items()}
