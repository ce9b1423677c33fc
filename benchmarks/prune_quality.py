"""What a cut costs by criterion, count and calibration text, bare and healed, on text that nothing was tuned on.

    python benchmarks/prune_quality.py [--checkpoint builtin:tiny-mixtral] [--resume rows.jsonl] [--json FILE]
    python benchmarks/prune_quality.py --checkpoint FOLDER --corpora CORPORA --without french --resume rows.jsonl

Every criterion chooses from one profile for each calibration seed, which draws other documents for the profile and
for healing and is the seed of the distillation; cuts that keep the same experts are measured once. Each is held
against the uncut checkpoint on one report text, by document: rises and what healing closes have 95 % intervals over
documents, paired. Builtin checkpoints calibrate, judge and report on those splits of the builtin traces. With
--corpora (folders DOMAIN/train.jsonl.gz and valid.jsonl.gz, which recipes/small/mixtral.yaml trains on) other ones
calibrate on the calibration split of train.jsonl.gz, judge on its validation split, and report on valid.jsonl.gz.

--beside own: heal also on what the checkpoint draws from itself (`moesurgeon sample`), uniform: on tokens drawn alike
from its vocabulary, each as one more domain of the same number of tokens. A file of --resume has rows with or without.

--top-k 1 [2 ...]: cut the checkpoint with so many experts per token (a bare retop) instead of as it is, and hold every
cut against that uncut. --validation-tokens N: also measure every cut on so much text of the validation split, and
print those tables first: choose by them, so that the report text chooses nothing. Last come the differences of every
criterion from --reference (reap), paired, over all counts.

--without DOMAIN: also cut a quarter by REAP without that domain in any text but the report. llm-compressor: REAP as
that package chooses it on the same windows, where it is installed (peer_reap.py); how many of its layers keep what
ours keeps there is in the row. All of it takes hours (a distilled cut of a tiny checkpoint 1 to 2 minutes): with
--resume every row is kept as it comes, and the same command goes on where it stopped.

Prints tables in Markdown, the bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/prune_quality.py`

from benchmarks.quality_compared import compared  # noqa: E402 - after its path
from benchmarks.quality_cuts import BESIDE, METHODS, PEER, RUNNING, Round  # noqa: E402
from benchmarks.quality_report import Results, bars, tables, unseen_table  # noqa: E402
from benchmarks.quality_text import Judge, Rows, words_for  # noqa: E402
from moesurgeon.engine.device import place  # noqa: E402
from moesurgeon.engine.streams import Source  # noqa: E402
from moesurgeon.pipeline.options import Writing  # noqa: E402
from moesurgeon.pipeline.retop import retop  # noqa: E402
from moesurgeon.pipeline.subject import Subject, open_subject  # noqa: E402
from moesurgeon.surgery.retop import RetopSpec  # noqa: E402

CRITERIA = ("frequency", "gate", "ean", "man", "reap", "traffic-reap", "random", "reconstruction", "healed", PEER)
# What has to be the same where a run goes on.
FIXED = ("tokens", "profile_tokens", "inner", "heldout_tokens", "report_tokens", "fresh", "steps",
         "tokens_per_step", "corpora", "beside")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", help="builtin:NAME or a folder; repeat for more")
    parser.add_argument("--corpora", help="text for checkpoints in folders; without it they get the builtin traces")
    parser.add_argument("--top-k", type=int, nargs="+", help="experts per token; default: the checkpoint's own")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="of the experts that go")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["bare", "distill"], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without", action="append", default=[], metavar="DOMAIN")
    parser.add_argument("--beside", nargs="+", choices=BESIDE, default=[], help="healed on as well; of the same tokens")
    parser.add_argument("--tokens", type=int, default=98304, help="to heal on")
    parser.add_argument("--profile-tokens", type=int, default=98304)
    parser.add_argument("--inner", type=int, default=4096, help="tokens of the inner products")
    parser.add_argument("--heldout-tokens", type=int, default=16384, help="that judge the healing")
    parser.add_argument("--fresh", action="store_true", help="report on builtin documents that the default leaves out")
    parser.add_argument("--report-tokens", type=int, help="default: 49152 of builtin traces, all of corpora")
    parser.add_argument("--validation-tokens", type=int, default=0, help="of validation text, to choose by")
    parser.add_argument("--reference", default="reap", help="the criterion that the others are compared with")
    parser.add_argument("--steps", type=int, default=600, help="of the distillation, for each layer")
    parser.add_argument("--tokens-per-step", type=int, default=2048, help="of the distillation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a JSONL file that keeps every row, and that is gone on with")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    fixed = FIXED + (("validation_tokens",) if given.validation_tokens else ())
    rows = Rows(given.resume, {name: getattr(given, name) for name in fixed})
    for name in given.checkpoint or ["builtin:tiny-mixtral", "builtin:tiny-deepseek"]:
        for top_k in given.top_k or [None]:
            measure_checkpoint(name, given, rows, top_k)
    if given.validation_tokens:
        chosen_by = Results(rows.all, on="validation")
        print(f"\nOn validation text\n\n{tables(chosen_by)}\n\n{compared(chosen_by, given.reference)}")
    results = Results(rows.all)
    print(f"\nOn report text\n\n{tables(results)}\n\n{unseen_table(results)}\n")
    print(f"{compared(results, given.reference)}\n")
    found = bars(results)
    for bar in found:
        print(bar["text"])
    brief = [{key: value for key, value in row.items() if key not in ("losses", "validation")} for row in results.rows]
    told = {"options": {**vars(given), "json": None, "resume": None}, "rows": brief, "bars": found}
    print(json.dumps(told))
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def measure_checkpoint(checkpoint: str, given: argparse.Namespace, rows: Rows, top_k: int | None = None) -> None:
    words, name = words_for(checkpoint, given), checkpoint.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    with ExitStack() as stack:
        subject = open_subject(checkpoint)
        if top_k is not None and top_k != subject.anatomy.top_k:
            name += f", top-{top_k}"
            subject = retopped(subject, top_k, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "retopped")
        placement = place(RUNNING.device, RUNNING.dtype, subject.stored_dtype)
        source = stack.enter_context(Source.of_checkpoint(subject.checkpoint, subject.anatomy, placement))
        judge = Judge(subject, words, source, given.validation_tokens)
        rows.know(name, subject, judge.text)
        for without in [None, *given.without]:
            for seed in range(given.seeds):
                Round(subject, name, words, judge, given, rows, without=without, seed=seed).run()


def retopped(subject: Subject, top_k: int, folder: Path) -> Subject:
    retop(subject.name, RetopSpec(top_k=top_k), Writing(output=folder))
    return open_subject(str(folder))


if __name__ == "__main__":
    main()
