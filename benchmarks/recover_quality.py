"""What fewer experts per token cost, and what every part of their recovery gives back, on text nothing was tuned on.

    python benchmarks/recover_quality.py [--top-k 1] [--ways ...] [--seeds 3] [--resume rows.jsonl]
    python benchmarks/recover_quality.py --checkpoint FOLDER --corpora CORPORA --resume rows.jsonl

tiny-mixtral top-2 -> top-1, tiny-deepseek 4 -> 2 and 4 -> 1, any other checkpoint to top-1: bare, healed layer by layer
(scale, ridge, ridge + distillation), recovered end to end from there (routers, experts, both, with other coefficients
of load balancing), and as a control what people do: a LoRA on the routers of the bare checkpoint by peft, with the
language-model loss and AdamW, for as many steps. "cut": top-1 and a quarter of the experts removed by REAP, bare,
healed and recovered. A seed is that of the distillation and of the recovery; what has none is measured once.

Each is held against the original on one report text, by document: rises and shares of the loss gap have 95 % intervals
over documents, paired. Use of experts is that of the report text; an expert has fallen if it has less than a quarter of
its fair share there and had more in the bare edit, or half of the little that it had, "surely" as recovery/floor.py
decides. Builtin checkpoints learn,
judge and report on those splits of the builtin traces. With --corpora (folders DOMAIN/train.jsonl.gz and
valid.jsonl.gz) others learn from the calibration split of train.jsonl.gz, judge on its validation split, and report on
valid.jsonl.gz.

All of it takes hours: with --resume every row is kept as it comes, and the same command goes on where it stopped.
--work keeps the checkpoints, so that the layers need not be healed again for it.

Prints tables in Markdown, the bars and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as `python benchmarks/recover_quality.py`

from benchmarks.quality_text import Rows, words_for  # noqa: E402 - after its path
from benchmarks.recover_report import Results, bars, domain_table, tables  # noqa: E402
from benchmarks.recover_ways import WAYS, Operation, Referee  # noqa: E402
from moesurgeon.pipeline.subject import open_subject  # noqa: E402
from moesurgeon.recovery.schedule import Schedule  # noqa: E402

BUILTIN = {"builtin:tiny-mixtral": (1,), "builtin:tiny-deepseek": (2, 1)}
# What has to be the same where a run goes on.
FIXED = ("heal_tokens", "heal_budget", "heal_split", "heal_steps", "tokens", "budget", "split", "heldout_tokens",
         "report_tokens", "fresh", "corpora", "steps", "tokens_per_step", "learning_rate", "expert_rate", "rank",
         "candidates", "control_rate")  # fmt: skip


def main() -> None:
    default = Schedule()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", help="builtin:NAME or a folder; repeat for more")
    parser.add_argument("--corpora", help="text for checkpoints in folders; without it they get the builtin traces")
    parser.add_argument("--top-k", type=int, nargs="+", help="of the result; default: as above")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal-tokens", type=int, default=98304, help="to heal on, layer by layer")
    parser.add_argument(
        "--heal-budget", action="append", default=[], metavar="NAME=TOKENS", help="of one domain of them"
    )
    parser.add_argument("--heal-split", choices=["calibration", "train"], default="calibration", help="to heal on")
    parser.add_argument("--heal-steps", type=int, default=600, help="for each layer")
    parser.add_argument("--tokens", type=int, default=589824, help="to recover on")
    parser.add_argument("--budget", action="append", default=[], metavar="NAME=TOKENS", help="of one domain of them")
    parser.add_argument("--split", choices=["calibration", "train"], default="calibration", help="to recover on")
    parser.add_argument("--heldout-tokens", type=int, default=32768, help="of the validation split, that judge")
    parser.add_argument("--fresh", action="store_true", help="report on builtin documents that the default leaves out")
    parser.add_argument("--report-tokens", type=int, help="default: 49152 of builtin traces, all of corpora")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--tokens-per-step", type=int, default=default.tokens_per_step)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--expert-rate", type=float, default=default.expert_rate)
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--candidates", type=int, help="experts per token that a router hears of; default: all")
    parser.add_argument("--control-rate", type=float, default=1e-3, help="learning rate of the control")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder that keeps the checkpoints")
    parser.add_argument("--resume", type=Path, help="a JSONL file that keeps every row, and that is gone on with")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = Rows(given.resume, {name: getattr(given, name) for name in FIXED})
    with tempfile.TemporaryDirectory() as folder:
        for name in given.checkpoint or BUILTIN:
            measure_checkpoint(name, given, rows, given.work or Path(folder))
    results = Results(rows.all)
    print(f"\n{tables(results)}\n\n{domain_table(results)}\n")
    found = bars(results)
    for bar in found:
        print(bar["text"])
    brief = [{key: value for key, value in row.items() if key != "losses"} for row in results.rows]
    options = {name: getattr(given, name) for name in FIXED}
    told = {"options": options, "rows": brief, "bars": found}
    print(json.dumps(told))
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def measure_checkpoint(checkpoint: str, given: argparse.Namespace, rows: Rows, folder: Path) -> None:
    subject, words = open_subject(checkpoint), words_for(checkpoint, given)
    name = checkpoint.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    referee = Referee(subject, words)
    rows.know(name, subject, referee.text)
    for top_k in given.top_k or BUILTIN.get(checkpoint, (1,)):
        operation = Operation(subject, name, top_k, words, referee, given=given, rows=rows, folder=folder / name)
        for way in given.ways:
            operation.measure(way)


if __name__ == "__main__":
    main()
