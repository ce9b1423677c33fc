"""The teacher of a recovery: whether it is the student itself, which experts both have, and what it said once."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import moesurgeon
from moesurgeon.checkpoint.compare import same_tensors
from moesurgeon.engine.budget import Demand, share_out
from moesurgeon.engine.device import Placement
from moesurgeon.engine.ranks import Ranks
from moesurgeon.engine.streams import Source, Stream
from moesurgeon.engine.working import COMPARED
from moesurgeon.errors import InputError, UsageError
from moesurgeon.families.keys import count_of
from moesurgeon.pipeline.provenance import history_of
from moesurgeon.pipeline.subject import Subject
from moesurgeon.pipeline.walking import hidden_folder
from moesurgeon.progress import Progress
from moesurgeon.recovery.judge import judged_batches
from moesurgeon.recovery.objective import Losses
from moesurgeon.recovery.said import spoken_batches
from moesurgeon.recovery.schedule import in_sampled_order
from moesurgeon.recovery.teacher import KEPT
from moesurgeon.recovery.teacher_cache import Cached, fill_cache, is_cached
from moesurgeon.surgery.numbering import source_experts
from moesurgeon.surgery.retop import RetopSpec, plan_retop
from moesurgeon.traces.windows import Corpus


def shares_weights(student: Subject, teacher: Subject) -> bool:
    """Whether ``student`` is ``teacher`` with at most another top-k: the same tensors, compared byte by byte."""
    if student.identity.tensors != teacher.identity.tensors:
        return False
    config, top_k = teacher.checkpoint.config, student.anatomy.top_k
    if student.checkpoint.config != config:
        if not top_k < teacher.anatomy.top_k or teacher.anatomy.family.fixed_top_k is not None:
            return False
        edited = plan_retop(teacher.anatomy, RetopSpec(top_k=top_k)).edited_config(config)
        if student.checkpoint.config != edited:
            return False
    return same_tensors(student.checkpoint, teacher.checkpoint)


def refuse_other_model(student: Subject, teacher: Subject, losses: Losses) -> None:
    """Raise UsageError for a teacher that the student cannot learn from token by token."""
    mine, theirs = (_vocabulary(one) for one in (student, teacher))
    if mine != theirs:
        raise UsageError(
            f"vocabularies differ ({mine} and {theirs} tokens): "
            "only checkpoints with the same tokenizer can be compared"
        )
    here, there = ((one.anatomy.layers, one.anatomy.hidden) for one in (student, teacher))
    if losses.hidden and here != there:
        raise UsageError(
            f"hidden states cannot be matched: the teacher has {there[0]} layers of width {there[1]}, the student "
            f"{here[0]} of {here[1]}; leave --hidden out"
        )


def _vocabulary(subject: Subject) -> int:
    """Return how many tokens have an embedding; what config.json says of it is checked when the model is built."""
    stored = subject.anatomy.tensors.get(subject.anatomy.family.embedding)
    return count_of(subject.anatomy.config, "vocab_size", 0) if stored is None else stored.shape[0]


def experts_of_teacher(student: Subject, teacher: Subject) -> dict[int, Sequence[int]] | None:
    """Return by layer the teacher's numbers of the student's experts, in the student's order; None if not known.

    They are known where ``moesurgeon.json`` says how the student came from the teacher, or where both have as many.
    """
    mine, theirs = student.anatomy, teacher.anatomy
    if mine.moe_layers != theirs.moe_layers:
        return None
    history = history_of(student)
    starts = [number for number, step in enumerate(history) if step["source"].get("fingerprint") == teacher.fingerprint]
    if starts:
        record = [operation for step in history[starts[-1] :] for operation in step["operations"]]
        found = {layer: source_experts(record, layer, theirs.experts) for layer in mine.moe_layers}
        if all(len(experts) == mine.experts for experts in found.values()):
            return {layer: experts for layer, experts in found.items()}
    if mine.experts == theirs.experts:
        return dict.fromkeys(mine.moe_layers, range(mine.experts))
    return None


def healed_before(student: Subject) -> list[dict[str, object]]:
    """Return what healing in the student's history closed of the gap, each on its own held-out text."""
    found = []
    for step in history_of(student):
        for operation in step["operations"]:
            loss = operation.get("heldout") if operation.get("operation") == "heal" else None
            if isinstance(loss, Mapping) and {"bare", "healed", "teacher"} <= loss.keys():
                gap = loss["bare"] - loss["teacher"]
                closed = (loss["bare"] - loss["healed"]) / gap if gap > 0 else None
                found.append({"method": operation.get("method"), "heldout": dict(loss), "gap_closed": closed})
    return found


def said_by(
    teacher: Subject,
    folder: Path,
    text: Corpus,
    heldout: Corpus,
    losses: Losses,
    experts: Mapping[int, Sequence[int]] | None,
    *,
    pool: Corpus,
    placement: Placement,
    length: int,
    ranks: Ranks | None = None,
    max_memory: int | None = None,
    streamed: bool = False,
    progress: Progress,
) -> Cached:
    """Return what ``teacher`` says of ``text``, from ``folder`` if it was said before, of this text or more.

    ``pool``: all that was read, of which ``text`` is what the steps need (``Schedule.needed``). It is asked for in an
    order in which less text is the beginning of more, so that the teacher sees the same batches.
    The teacher is in memory only meanwhile: as a whole if ``max_memory`` has room for it, unless it is to be
    ``streamed``. Of several ``ranks`` the first asks it, the others wait.
    """
    digest = cache_digest(teacher, pool, heldout, losses, placement=placement, length=length)
    place = folder / f"teacher-{digest[:16]}"
    ranks = ranks or Ranks()
    asked = replace(text, windows=in_sampled_order(text.windows))
    if ranks.is_first and not is_cached(place, digest, text.windows):
        with Source.of_checkpoint(teacher.checkpoint, teacher.anatomy, placement) as source:

            @cache
            def demand(tokens: int) -> Demand:
                made = [each(placement.device, tokens) for each in (spoken, judged)]
                return Demand(batches=[batch for each in made for batch in each], logits=COMPARED)

            spoken, judged = partial(spoken_batches, asked, length), partial(judged_batches, heldout, length)
            memory = share_out(max_memory, [source], demand)
            if memory.note:
                progress.note(memory.note)
            with hidden_folder(not memory.hidden_in_files) as states:
                if streamed:
                    source.supply.allow(source.supply.at_least(ahead=memory.read_ahead), ahead=memory.read_ahead)
                fill_cache(
                    place,
                    digest,
                    Stream(source, skeleton=source.skeleton),
                    corpus=asked,
                    heldout=heldout,
                    losses=losses,
                    length=length,
                    states=states,
                    progress=progress,
                )
        del source
        gc.collect()  # modules and their parents refer to each other
    ranks.least(1)  # it has said all
    if not is_cached(place, digest, text.windows):
        raise InputError(f"{place} has not what the teacher said; name a --cache that all processes can read")
    return Cached(place, text, experts if losses.router else None)


def cache_digest(
    teacher: Subject, pool: Corpus, heldout: Corpus, losses: Losses, *, placement: Placement, length: int
) -> str:
    """Return a hash of all that the cache depends on; which windows of ``pool`` it holds it says itself."""
    facts = {
        "version": moesurgeon.__version__,
        "teacher": teacher.fingerprint,
        "shards": {shard: header.state for shard, header in teacher.checkpoint.headers.items()},
        "text": [tokens_digest(pool), tokens_digest(heldout), length],
        "asked": [losses.objective, losses.temperature, losses.router > 0, losses.hidden > 0, KEPT],
        "placement": str(placement),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tokens_digest(corpus: Corpus) -> str:
    """Return a hash of the windows of ``corpus``, in order."""
    digest = hashlib.sha256()
    for window in corpus.windows:
        digest.update(f"\n{window.domain} {window.document} {window.start} {len(window.tokens)}\n".encode())
        digest.update(window.tokens.tobytes())
    return digest.hexdigest()
