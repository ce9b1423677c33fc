"""``evaluate``: held-out loss, alone or against another checkpoint, and what has to be true of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesurgeon.engine.device import Placement, place
from moesurgeon.engine.model import context_length
from moesurgeon.engine.ranks import Ranks, join_ranks
from moesurgeon.engine.streams import Stream
from moesurgeon.errors import UsageError
from moesurgeon.evaluation.continuations import PROMPT_TOKENS, ROWS, continuations, prompts_of
from moesurgeon.evaluation.degeneration import degeneration
from moesurgeon.evaluation.figures import Figures, figures_of, is_interval_end
from moesurgeon.evaluation.gate import Gate, parse_gate
from moesurgeon.evaluation.measure import measure
from moesurgeon.evaluation.summary import expected_report, possible_report, summarise
from moesurgeon.pipeline.decoding import decoding_bytes, ends_of, refuse_spread, whole
from moesurgeon.pipeline.held_out import held_out_text
from moesurgeon.pipeline.options import Running, Text
from moesurgeon.pipeline.subject import Subject, open_subject
from moesurgeon.pipeline.text import file_facts, trace_specs, window_length
from moesurgeon.pipeline.tokenizers import refuse_other_tokenizer
from moesurgeon.pipeline.walking import Ready, ready
from moesurgeon.progress import SILENT, Progress
from moesurgeon.traces.document_hashes import Hashes
from moesurgeon.traces.windows import Corpus


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is looked at beside the losses.

    ``gates``: conditions on the report, all of which have to hold. ``continuations``: how many prompts are
    continued greedily, by up to ``new_tokens`` tokens, to see how much of it is repetition. ``include_healed``: measure
    on documents that healed one of the checkpoints as well. ``left_out``: documents that are left out besides.
    """

    gates: tuple[str, ...] = ()
    continuations: int = 0
    new_tokens: int = 64
    include_healed: bool = False
    left_out: Hashes = frozenset()


def evaluate(
    source: str,
    against: str | None,
    text: Text,
    running: Running,
    progress: Progress = SILENT,
    spec: EvaluateSpec | None = None,
) -> dict[str, Any]:
    """Measure ``source`` on the report split, and its distance from the checkpoint ``against``.

    A gate that fails is in the report and raises nothing: what that means is for the caller to say.
    """
    spec = spec or EvaluateSpec()
    subject = open_subject(source)
    other = open_subject(against) if against else None
    subjects = [subject, other] if other else [subject]
    gate = read_gate(subject, text, spec, has_teacher=other is not None)
    if other:
        refuse_other_tokenizer(subject, other, progress)
    placement = place(running.device, running.dtype, subject.stored_dtype)
    if spec.continuations:
        refuse_spread(placement, "--continuations")
    length = window_length(subject, text)
    _refuse_long(subjects, spec, length)
    corpus, healed_text = held_out_text(
        subjects, text, include=spec.include_healed, also=spec.left_out, progress=progress
    )
    refuse_unknown_intervals(gate, corpus, has_teacher=other is not None)
    ranks = join_ranks(running.device)
    with ready(
        subjects, corpus, placement, running, length=length,
        whole="--continuations" if spec.continuations else None,
        work=_continuing_bytes(subjects, spec, placement), ranks=ranks, progress=progress,
    ) as walk:  # fmt: skip
        streams = [Stream(each) for each in walk.sources]
        measured = measure(
            streams[0],
            corpus.domains,
            walk.batches,
            teacher=streams[1] if other else None,
            ranks=ranks,
            folder=walk.folder,
            progress=progress,
        )
        report = summarise(measured)
        if spec.continuations:
            mine, *theirs = _continued(walk, subjects, corpus, spec, ranks, progress)
            report["degeneration"] = mine
            if theirs:
                report["against"]["degeneration"] = theirs[0]
        is_resident, memory = walk.is_resident, walk.memory.as_dict()
    return {
        "checkpoint": source,
        "compared_with": against,
        "splits": dict(corpus.splits),
        "trace_hashes": dict(corpus.hashes),
        "healed_text": healed_text,
        "files": file_facts(corpus),
        "placement": str(placement),
        "resident": is_resident,
        "memory": memory,
        **report,
        **({"gate": gate.judge(figures_of(report))} if gate else {}),
    }


def read_gate(subject: Subject, text: Text, spec: EvaluateSpec, *, has_teacher: bool) -> Gate | None:
    """Return the gate that ``spec`` asks for; UsageError for a name that its report cannot have."""
    gate = parse_gate(spec.gates)
    if gate is None:
        return None
    domains = [each.domain for each in trace_specs(text)]
    length = window_length(subject, text)

    def possible(has_teacher: bool, continues: bool) -> Figures:
        report = possible_report(domains, length=length, has_teacher=has_teacher)
        if continues:
            report["degeneration"] = degeneration([], domains, spec.new_tokens)
            if has_teacher:
                report["against"]["degeneration"] = report["degeneration"]
        return figures_of(report)

    continues = spec.continuations > 0
    otherwise = {
        "--against CKPT": possible(True, continues),
        "--continuations N": possible(has_teacher, True),
        "--against CKPT and --continuations N": possible(True, True),
    }
    gate.check(possible(has_teacher, continues), otherwise)
    return gate


def needs_intervals(gate: Gate | None) -> bool:
    """Tell whether ``gate`` names an end of an interval over documents."""
    return gate is not None and any(map(is_interval_end, gate.figures))


def refuse_unknown_intervals(gate: Gate | None, corpus: Corpus, *, has_teacher: bool) -> None:
    """Raise UsageError if ``gate`` needs an end of an interval for which ``corpus`` has too few documents."""
    if needs_intervals(gate):
        assert gate is not None
        gate.refuse_unknown_intervals(
            figures_of(expected_report(corpus.windows, corpus.domains, has_teacher=has_teacher))
        )


def _refuse_long(subjects: Sequence[Subject], spec: EvaluateSpec, length: int) -> None:
    """Raise UsageError if prompts and what comes behind them do not fit into a context."""
    prompt = min(PROMPT_TOKENS, length // 2)
    for subject in subjects if spec.continuations else ():
        most = context_length(subject.anatomy) - prompt
        if spec.new_tokens > most:
            raise UsageError(
                f"--new-tokens {spec.new_tokens} does not fit behind a prompt of {prompt} tokens into the context "
                f"of {subject.name}; give at most {most}"
            )


def _continuing_bytes(subjects: Sequence[Subject], spec: EvaluateSpec, placement: Placement) -> int:
    """Return what continuing prompts takes beside the weights."""
    if not spec.continuations:
        return 0
    positions = PROMPT_TOKENS + spec.new_tokens
    return max(decoding_bytes(subject.anatomy, placement, rows=ROWS, positions=positions) for subject in subjects)


def _continued(
    walk: Ready, subjects: Sequence[Subject], corpus: Corpus, spec: EvaluateSpec, ranks: Ranks, progress: Progress
) -> list[dict[str, Any]]:
    """Return how each of ``subjects`` goes on with the same prompts."""
    prompts = prompts_of(corpus.windows, corpus.domains, spec.continuations)
    reports = []
    for subject, source in zip(subjects, walk.sources, strict=True):
        with whole(source) as model:
            made = continuations(model, prompts, spec.new_tokens, ends_of(subject), ranks=ranks, progress=progress)
        reports.append(degeneration(made, corpus.domains, spec.new_tokens))
    return reports
