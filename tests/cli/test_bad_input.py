"""What cannot be used is refused: the right exit code, one line with what to do, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.cli.broken import CONTRADICTORY, SHARD, UNREADABLE, whole
from tests.cli.conftest import TEXT
from tests.cli.invoke import contents, moesurgeon, one_line, refused, succeeded

MIXTRAL, DEEPSEEK = "builtin:tiny-mixtral", "builtin:tiny-deepseek"
USAGE, INPUT, OUTPUT = 2, 3, 5


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path) -> Iterator[None]:
    """Whatever a test here does, there is nothing new below its output folder."""
    folder = tmp_path / "written"
    folder.mkdir()
    yield
    assert contents(folder) == {}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "written" / "out"


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a checkpoint of ``broken.py`` by its name, made on first use."""
    folder = tmp_path_factory.mktemp("broken")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            (UNREADABLE.get(name) or CONTRADICTORY[name])[0](made[name])
        return made[name]

    return get


# ---- checkpoints, for every command and every place that takes one


def _recipe(checkpoint: Path | str, folder: Path, steps: str = "[{retop: {}}]") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"checkpoint: {checkpoint}\nsteps: {steps}\n")
    return path


PLACES: dict[str, Callable[[Path, Path], list[str | Path]]] = {
    "retop": lambda bad, out: ["retop", bad, out],
    "profile": lambda bad, out: ["profile", bad, "-o", out, *TEXT],
    "prune": lambda bad, out: ["prune", bad, out, "--keep", "6", "--profile", "nowhere"],
    "recover": lambda bad, out: ["recover", bad, out, "--teacher", MIXTRAL, *TEXT],
    "recover-teacher": lambda bad, out: ["recover", MIXTRAL, out, "--teacher", bad, *TEXT],
    "evaluate": lambda bad, out: ["evaluate", bad, *TEXT],
    "evaluate-against": lambda bad, out: ["evaluate", MIXTRAL, "--against", bad, *TEXT],
    "run": lambda bad, out: ["run", _recipe(bad, out.parents[1]), "-o", out],
}


@pytest.mark.parametrize("place", [*PLACES, "inspect", "verify"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_checkpoint(kind: str, place: str, broken: Callable[[str], Path], out: Path) -> None:
    command = PLACES.get(place, lambda bad, out: [place, bad])
    refused(INPUT, *command(broken(kind), out), says=UNREADABLE[kind][1:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CONTRADICTORY)
def test_contradictory_checkpoint(kind: str, place: str, broken: Callable[[str], Path], out: Path) -> None:
    message = outcome_of_contradiction(INPUT, PLACES[place](broken(kind), out))
    assert CONTRADICTORY[kind][1] in message


@pytest.mark.parametrize("kind", CONTRADICTORY)
def test_contradictory_checkpoint_is_described_and_does_not_verify(kind: str, broken: Callable[[str], Path]) -> None:
    assert CONTRADICTORY[kind][1] in " ".join(succeeded("inspect", broken(kind), "--json").json["problems"])
    assert "does not verify" in outcome_of_contradiction(OUTPUT, ["verify", broken(kind)])


def outcome_of_contradiction(code: int, command: list[str | Path]) -> str:
    """What is wrong is all that can be said here: which of the two is right, only the user knows."""
    outcome = moesurgeon(*command)
    assert outcome.code == code and outcome.out == "" and len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err


def test_verify_source(broken: Callable[[str], Path], top1: dict[str, Path]) -> None:
    result = top1[MIXTRAL]
    refused(INPUT, "verify", result, "--source", broken("truncated"), says=("truncated", "download"))
    refused(INPUT, "verify", result, "--source", DEEPSEEK, says=("was not made from", "fingerprints"))
    refused(INPUT, "verify", MIXTRAL, "--source", MIXTRAL, says=("no moesurgeon.json", "no record"))


def test_checkpoint_that_was_changed_after_its_surgery(tmp_path: Path, top1: dict[str, Path]) -> None:
    """One bit of one tensor, behind the back of the fingerprint's samples."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in top1[MIXTRAL].iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    shard = sorted(changed.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    succeeded("verify", changed)
    refused(OUTPUT, "verify", changed, "--source", MIXTRAL, says=("does not verify", "differs from"))


@pytest.mark.parametrize("content", ["{", "[]", '{"history": 5}', '{"history": [5]}'])
def test_damaged_record(content: str, tmp_path: Path) -> None:
    damaged = whole(tmp_path / "damaged")
    (damaged / "moesurgeon.json").write_text(content)
    refused(INPUT, "verify", damaged, says=("moesurgeon.json",))


@pytest.mark.parametrize("command", ["inspect", "retop", "prune", "profile", "recover", "evaluate", "verify"])
def test_unknown_builtin(command: str, out: Path) -> None:
    places = {"inspect": lambda bad, out: ["inspect", bad], "verify": lambda bad, out: ["verify", bad], **PLACES}
    refused(USAGE, *places[command]("builtin:huge-mixtral", out), says=("'huge-mixtral'", "tiny-mixtral"))


def test_hub_names() -> None:
    refused(USAGE, "inspect", "hf://a/b/c/d", says=("hf://a/b/c/d", "hf://org/name"))


def test_path_that_no_file_system_takes() -> None:
    refused(INPUT, "inspect", "x" * 5000, says=("name too long",))


# ---- outputs


OUTPUTS: dict[str, Callable[[str | Path], list[str | Path]]] = {
    "retop": lambda out: ["retop", MIXTRAL, out],
    "prune": lambda out: ["prune", MIXTRAL, out, "--keep", "6", "--profile", "nowhere"],
    "profile": lambda out: ["profile", MIXTRAL, "-o", out, *TEXT],
    "recover": lambda out: ["recover", MIXTRAL, out, "--teacher", MIXTRAL, *TEXT],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_output_folder_that_is_not_empty(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    refused(USAGE, *OUTPUTS[command](tmp_path), says=("is not empty", "--overwrite"))
    # What was not made by such a command is not replaced by one.
    refused(USAGE, *OUTPUTS[command](tmp_path), "--overwrite", says=("does not replace it", "choose another"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", OUTPUTS)
def test_output_that_is_a_file_or_below_one(command: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(USAGE, *OUTPUTS[command](file), says=("not a folder", "choose another"))
    refused(USAGE, *OUTPUTS[command](file), "--overwrite", says=("not a folder", "choose another"))
    refused(USAGE, *OUTPUTS[command](file / "below"), says=("is a file", "choose another"))
    refused(OUTPUT, *OUTPUTS[command](tmp_path / ("x" * 300)), says=("too long", "choose another"))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("command", ["retop", "profile", "prune", "recover", "recover-teacher", "run"])
def test_output_in_or_around_the_source(command: str, overwrite: list[str], tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    before = contents(source)
    for place in (source, source / "inside", tmp_path):
        refused(USAGE, *_to(command, source, place, tmp_path), *overwrite, says=("overlap", "choose"))
    assert contents(source) == before


def _to(command: str, source: Path, place: Path, folder: Path) -> list[str | Path]:
    if command == "run":
        return ["run", _recipe(source, folder), "-o", place]
    return [place if part == folder / "OUT" else part for part in PLACES[command](source, folder / "OUT")]


def test_run_folder_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    recipe = _recipe(MIXTRAL, tmp_path)
    before = contents(tmp_path)
    for extra in ([], ["--overwrite"]):
        refused(USAGE, "run", recipe, "-o", tmp_path / "folder", *extra, says=("not the folder of a run", "choose"))
        refused(USAGE, "run", recipe, "-o", recipe, *extra, says=("not a folder", "choose"))
    assert contents(tmp_path) == before


# ---- retop, layouts


def test_top_k(out: Path) -> None:
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "0", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "-1", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "one", says=("--top-k",))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "3", says=("--top-k 3", "between 1 and", "2"))
    refused(USAGE, "retop", MIXTRAL, out, "--top-k", "2", says=("nothing to do", "--allow-noop"))


@pytest.mark.parametrize("command", ["retop", "prune", "recover"])
def test_unknown_layout(command: str, out: Path, profiles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Before any work: recover must not train first.
    monkeypatch.setattr("moesurgeon.pipeline.recover.load_model", pytest.fail)
    arguments = {
        "retop": ["retop", MIXTRAL, out],
        "prune": ["prune", MIXTRAL, out, "--keep", "6", "--profile", profiles[MIXTRAL]],
        "recover": ["recover", MIXTRAL, out, "--teacher", MIXTRAL, *TEXT],
    }[command]
    refused(USAGE, *arguments, "--layout", "sparse", says=("'sparse'", "per-expert, fused"))
    refused(USAGE, *arguments, "--layout", "qwen2-moe", says=("DeepSeek-MoE v1", "not for Mixtral"))


# ---- prune


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "1"], ("keep at least 2 experts",)),
        (["--keep", "0"], ("keep at least 2 experts",)),
        (["--keep", "-3"], ("keep at least 2 experts",)),
        (["--keep", "9"], ("cannot keep 9 experts", "has 8")),
        (["--keep", "8"], ("nothing to prune", "keep fewer")),
        (["--keep", "six"], ("--keep",)),
        (["--ratio", "0"], ("--ratio 0 is not between 0 and 1", "share")),
        (["--ratio", "1"], ("--ratio 1 is not between 0 and 1", "share")),
        (["--ratio", "-0.5"], ("--ratio -0.5", "share")),
        (["--ratio", "nan"], ("--ratio nan", "share")),
        (["--ratio", "0.1"], ("less than one", "nothing would be removed")),
        (["--ratio", "0.9"], ("keep at least 2 experts",)),
        (["--ratio", "a lot"], ("--ratio",)),
        (["--keep", "6", "--ratio", "0.25"], ("--keep N, --ratio R or --below S", "one of them")),
        ([], ("--keep N, --ratio R or --below S", "one of them")),
        (["--keep", "6", "--criterion", "luck"], ("--criterion luck", "reap")),
        (["--keep", "6", "--criterion", "random", "--seed", "-1"], ("--seed",)),
        (["--keep", "6", "--no-such-option"], ("--no-such-option",)),
    ],
    ids=" ".join,
)  # fmt: skip
def test_prune_arguments(arguments: list[str], says: tuple[str, ...], out: Path, profiles: dict[str, Path]) -> None:
    refused(USAGE, "prune", MIXTRAL, out, "--profile", profiles[MIXTRAL], *arguments, says=says)


def test_prune_without_a_profile(out: Path) -> None:
    refused(USAGE, "prune", MIXTRAL, out, "--keep", "6", says=("--profile", "--keep-experts"))


LAYERS = {str(layer): [0, 1, 2, 3, 4, 5] for layer in range(4)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", ("not of the form", '{"LAYER": [expert, ...]}')),
        ("", ("not of the form",)),
        ("[" * 100_000, ("not of the form",)),
        (b"\xff\xfe", ("not of the form",)),
        ("[]", ("must map each layer",)),
        ("{}", ("must map each layer",)),
        ("7", ("not of the form",)),
        ({**LAYERS, "3": 5}, ("not of the form",)),
        ({**LAYERS, "three": [1, 2]}, ("not of the form", "three")),
        ({**LAYERS, "3": []}, ("not empty",)),
        ({**LAYERS, "3": ["a", "b"]}, ("expert numbers",)),
        ({**LAYERS, "3": [True, 1, 2, 3, 4, 5]}, ("expert numbers",)),
        ({**LAYERS, "3": [0.0, 1, 2, 3, 4, 5]}, ("expert numbers",)),
        ({**LAYERS, "3": "012345"}, ("expert numbers",)),
        ({**LAYERS, "3": [0, 1, 2, 3, 4]}, ("different counts", "same in every layer")),
        ({**LAYERS, "3": [0, 1, 2, 3, 4, 8]}, ("layer 3 has no expert 8", "0 to 7")),
        ({**LAYERS, "3": [-1, 1, 2, 3, 4, 5]}, ("layer 3 has no expert -1", "0 to 7")),
        ({**LAYERS, "3": [0, 1, 2, 3, 4, 4]}, ("layer 3 lists an expert twice", "once")),
        ({**LAYERS, "4": [0, 1, 2, 3, 4, 5]}, ("layer 4 has no routed experts", "0, 1, 2, 3")),
        ({layer: [0] for layer in LAYERS}, ("keep at least 2 experts",)),
        ({layer: LAYERS[layer] for layer in "012"}, ("no experts are given for layer 3", "list every one")),
        ('{"0": [0, 1], "00": [1, 2], "1": [0, 1], "2": [0, 1], "3": [0, 1]}', ("names a layer twice", "once")),
        ('{"0": [0, 1], "0": [1, 2], "1": [0, 1], "2": [0, 1], "3": [0, 1]}', ("names a layer twice", "once")),
    ],
    ids=str,
)
def test_list_of_experts(content: object, says: tuple[str, ...], out: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", path, says=(str(path), *says))


def test_list_of_experts_is_missing_or_not_alone(out: Path, tmp_path: Path) -> None:
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", tmp_path / "nowhere.json", says=("cannot be read", "give"))
    refused(INPUT, "prune", MIXTRAL, out, "--keep-experts", tmp_path, says=("cannot be read", "give"))
    path = tmp_path / "kept.json"
    path.write_text(json.dumps(LAYERS))
    for other in (["--keep", "6"], ["--keep", "0"], ["--ratio", "0.5"], ["--profile", tmp_path]):
        refused(USAGE, "prune", MIXTRAL, out, "--keep-experts", path, *other, says=("leave out",))


def test_profile_of_another_checkpoint(out: Path, profiles: dict[str, Path], top1: dict[str, Path]) -> None:
    command = ("prune", MIXTRAL, out, "--keep", "6", "--profile")
    refused(INPUT, *command, profiles[DEEPSEEK], says=("16 experts", "profile builtin:tiny-mixtral itself"))
    other = ("prune", top1[MIXTRAL], out, "--keep", "6", "--profile", profiles[MIXTRAL])
    refused(INPUT, *other, says=("taken from another checkpoint", "itself"))


def _damages() -> dict[str, Callable[[Path], object]]:
    def facts(**changes: object) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            path = folder / "profile.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return damage

    def sums(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
        def damage(folder: Path) -> None:
            arrays = {name: array.copy() for name, array in load_file(folder / "stats.safetensors").items()}
            change(arrays)
            save_file(arrays, folder / "stats.safetensors")

        return damage

    def truncate(folder: Path) -> None:
        path = folder / "stats.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    return {
        "no facts": lambda folder: (folder / "profile.json").unlink(),
        "no sums": lambda folder: (folder / "stats.safetensors").unlink(),
        "no JSON": lambda folder: (folder / "profile.json").write_text("{"),
        "a list": lambda folder: (folder / "profile.json").write_text("[]"),
        "nested": lambda folder: (folder / "profile.json").write_text("[" * 100_000),
        "another schema": facts(schema_version=99),
        "no layers": facts(layers=None),
        "words for experts": facts(experts="many"),
        "no origin": facts(origin={}),
        "truncated": truncate,
        "a sum is missing": sums(lambda arrays: arrays.pop("weighted_norm")),
        "a sum of another shape": sums(lambda arrays: arrays.update(weighted_norm=np.zeros((1, 2, 3)))),
        "no number": sums(lambda arrays: arrays["weighted_norm"].fill(np.nan)),
        "no count of tokens": sums(lambda arrays: arrays.pop("seen")),
    }


@pytest.mark.parametrize("damage", _damages())
def test_damaged_profile(damage: str, out: Path, tmp_path: Path, profiles: dict[str, Path]) -> None:
    folder = tmp_path / "profile"
    folder.mkdir()
    for path in profiles[MIXTRAL].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    _damages()[damage](folder)
    refused(INPUT, "prune", MIXTRAL, out, "--keep", "6", "--profile", folder, says=(str(folder), "profile"))


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_no_profile(path: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("prune", MIXTRAL, out, "--keep", "6", "--profile", tmp_path / path)
    refused(INPUT, *arguments, says=("is no profile", "make one with moesurgeon profile"))


# ---- text and the machine, for every command that runs a model


RUNNING: dict[str, Callable[[Path], list[str | Path]]] = {
    "profile": lambda out: ["profile", MIXTRAL, "-o", out],
    "evaluate": lambda out: ["evaluate", MIXTRAL],
    "recover": lambda out: ["recover", MIXTRAL, out, "--teacher", DEEPSEEK],
}
running = pytest.mark.parametrize("command", RUNNING)


@running
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "", ("holds no text", "give another trace")),
        ("empty.txt", "", ("holds no text", "give another trace")),
        ("blank.jsonl", '{"text": " "}\n\n', ("holds no text", "give another trace")),
        ("bad.jsonl", '{"text": "fine"}\n{"text": \n', ("line 2: not JSON", "one object per line")),
        ("list.jsonl", "[1, 2]\n", ("line 1: list where an object", "one object per line")),
        ("column.jsonl", '{"body": "x"}\n', ("no column text", "PATH:COLUMN")),
        ("number.jsonl", '{"text": 5}\n', ("line 1: int", "PATH:COLUMN")),
        ("latin1.txt", b"caf\xe9 " * 50, ("not UTF-8", "iconv")),
        ("broken.jsonl.gz", b"no gzip", ("cannot be read", "again")),
        ("broken.parquet", b"no parquet", ("cannot be read", "again")),
        ("notes.docx", "x", ("not a kind of file", "give a")),
    ],
)
def test_bad_trace(
    command: str, name: str, content: str | bytes, says: tuple[str, ...], out: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    says = says if command != "recover" or "holds no text" not in says else says[:1]
    refused(INPUT, *RUNNING[command](out), "-t", tmp_path / name, says=says)


@running
def test_trace_arguments(command: str, out: Path, tmp_path: Path) -> None:
    arguments = RUNNING[command](out)
    refused(INPUT, *arguments, "-t", tmp_path / "nowhere.jsonl", says=("no such file", "builtin:all"))
    refused(INPUT, *arguments, "-t", tmp_path / "written", says=("without traces", "give"))
    refused(USAGE, *arguments, "-t", "builtin:klingon", says=("'klingon'", "python"))
    refused(USAGE, *arguments, "-t", "builtin:json", "-t", "builtin:json", says=("two traces", "NAME="))
    refused(USAGE, *arguments, "-t", "builtin:all", "--max-tokens", "9", says=("too few for 6 traces", "at least 48"))
    refused(USAGE, *arguments, "-t", "builtin:all", "--max-tokens", "0", says=("--max-tokens",))
    refused(USAGE, *arguments, "-t", "builtin:json", "--split", "holdout", says=("--split", "holdout"))


@running
def test_machine_arguments(command: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*RUNNING[command](out), *TEXT]
    if not torch.cuda.is_available():
        refused(USAGE, *arguments, "--device", "cuda", says=("--device cuda cannot be used here", ": "))
    refused(USAGE, *arguments, "--device", "abacus", says=("--device abacus cannot be used here",))
    refused(USAGE, *arguments, "--device", "meta", says=("--device meta cannot be used here",))
    refused(USAGE, *arguments, "--device", "", says=("--device",))
    refused(USAGE, *arguments, "--dtype", "int4", says=("--dtype int4 is not one of", "bfloat16"))
    refused(USAGE, *arguments, "--length", "4096", says=("--length 4096", "context of 512"))
    refused(USAGE, *arguments, "--length", "7", says=("--length",))


@running
def test_tokenizer_of_another_model(command: str, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {"id": 2048, "content": " = ", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}
    )  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    arguments = [source if part == MIXTRAL else part for part in RUNNING[command](out)]
    refused(INPUT, *arguments, *TEXT, says=("makes token 2048", "has 2048", "copy the right one"))
    path.write_text("{}")
    refused(INPUT, *arguments, *TEXT, says=("tokenizer.json: damaged", "copy it from"))
    path.unlink()
    refused(INPUT, *arguments, *TEXT, says=("no tokenizer", "copy tokenizer.json"))


@running
@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "sigh"}, {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"vocab_size": "big"},
     {"vocab_size": 4096}, {"rope_theta": "fast"}],
    ids=str,
)  # fmt: skip
def test_config_that_only_the_model_reads(command: str, changes: dict[str, object], out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    outcome = moesurgeon(*[source if part == MIXTRAL else part for part in RUNNING[command](out)], *TEXT)
    one_line(outcome, INPUT, "config.json" if changes != {"vocab_size": "big"} else "vocab_size")


@running
def test_weights_that_are_no_numbers(command: str, out: Path, tmp_path: Path) -> None:
    source = whole(tmp_path / "source")
    shard = source / SHARD
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    with shard.open("r+b") as file:
        file.seek(8 + header)
        file.write(b"\xff\xff" * 1000)  # NaN in bfloat16
    arguments = [source if part == MIXTRAL else part for part in RUNNING[command](out)]
    few = ("--heldout-tokens", "64") if command == "recover" else ()
    refused(INPUT, *arguments, *TEXT, *few, says=("NaN", "try float32"))


# ---- recover


def test_recover_arguments(out: Path, top1: dict[str, Path]) -> None:
    command = ("recover", top1[MIXTRAL], out, "--teacher", MIXTRAL, *TEXT)
    refused(USAGE, *command, "--objective", "lm", says=("top-1 Mixtral", "use --objective distill"))
    refused(USAGE, *command, "--objective", "hope", says=("--objective", "hope"))
    refused(USAGE, "recover", MIXTRAL, out, says=("--teacher",))
    for split in ("validation", "all"):
        refused(USAGE, *command, "--split", split, says=("would train on the text that judges", "use train"))
    for option in ("--steps", "--rank", "--judge-every", "--tokens-per-step", "--candidates", "--heldout-tokens"):
        refused(USAGE, *command, option, "0", says=(option,))
    for option in ("--learning-rate", "--balance", "--temperature", "--seed"):
        refused(USAGE, *command, option, "-1", says=(option,))


def test_recover_that_finds_nothing(out: Path, top1: dict[str, Path]) -> None:
    few = ("--steps", "1", "--tokens-per-step", "64", "--heldout-tokens", "64", "--learning-rate", "0")
    command = ("recover", top1[MIXTRAL], out, *TEXT, *few)
    refused(USAGE, *command, "--teacher", MIXTRAL, says=("nothing better than the start", "--allow-noop"))
    refused(USAGE, *command, "--teacher", top1[MIXTRAL], says=("its own teacher", "give the checkpoint before"))


# ---- recipes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ("the recipe must be keys with values",)),
        ("just words", ("the recipe must be keys with values", "see")),
        ("a: [", ("not valid YAML", "correct it")),
        ("[" * 5000, ("not valid YAML", "correct it")),
        ("a: !!python/object/apply:os.system [ls]", ("not valid YAML", "correct it")),
        ("steps: [{retop: {}}]", ("checkpoint is missing", "add it")),
        ("checkpoint: builtin:tiny-mixtral", ("steps is missing", "add it")),
        ("checkpoint: 5\nsteps: [{retop: {}}]", ("checkpoint", "string")),
        ("checkpoint: c\nsteps: []", ("no steps", "list at least one")),
        ("checkpoint: c\nsteps: 5", ("steps",)),
        ("checkpoint: c\nsteps: [5]", ("steps.0 must be keys with values",)),
        ("checkpoint: c\nsteps: [{}]", ("steps.0", "exactly one key")),
        ("checkpoint: c\nsteps: [{retop: {}, recover: {}}]", ("steps.0", "exactly one key")),
        ("checkpoint: c\nsteps: [{frobnicate: {}}]", ("steps.0.frobnicate", "no such key")),
        ("checkpoint: c\nspeed: fast\nsteps: [{retop: {}}]", ("speed", "no such key")),
        ("checkpoint: c\nsteps: [{retop: {topk: 1}}]", ("steps.0.retop.topk", "no such key")),
        ("checkpoint: c\nsteps: [{retop: {top_k: one}}]", ("steps.0.retop.top_k", "one")),
        ("checkpoint: c\nsteps: [{prune: {keep: 6}}]", ("prune needs a profile", "put a profile step before it")),
        ("checkpoint: c\nsteps: [{profile: {}}, {retop: {}}, {prune: {keep: 6}}]", ("prune needs a profile",)),
        ("checkpoint: c\nsteps: [{recover: {schedule: {steps: 0}}}]", ("recover.schedule.steps", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {judge_every: 0}}}]", ("schedule.judge_every", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {rank: 0}}}]", ("schedule.rank", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {seed: -1}}}]", ("schedule.seed", "greater")),
        ("checkpoint: c\nsteps: [{recover: {schedule: {learning_rate: .nan}}}]", ("learning_rate",)),
        ("checkpoint: c\nsteps: [{recover: {losses: {objective: hope}}}]", ("losses.objective", "distill")),
        ("checkpoint: c\nsteps: [{recover: {losses: {temperature: 0}}}]", ("losses.temperature",)),
        ("checkpoint: c\ntext: {split: mine}\nsteps: [{retop: {}}]", ("text.split", "calibration")),
        ("checkpoint: c\nreport_tokens: 0\nsteps: [{retop: {}}]", ("report_tokens", "greater")),
        ("checkpoint: nowhere\nsteps: [{retop: {}}]", ("nowhere does not exist", "give the folder")),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 100 else "",
)  # fmt: skip
def test_malformed_recipe(text: str, says: tuple[str, ...], out: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(INPUT, "run", path, "-o", out, says=says)


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("steps: [{retop: {top_k: 3}}]", ("between 1 and", "2")),
        ("steps: [{retop: {}}, {retop: {}}, {retop: {top_k: 2}}]", ("between 1 and", "1")),
        ("steps: [{profile: {}}, {prune: {keep: 1}}]", ("keep at least 2 experts",)),
        ("steps: [{profile: {}}, {prune: {keep: 6, ratio: 0.5}}]", ("one of them",)),
        ("steps: [{profile: {}}, {prune: {keep: 6, virtual: true}}]", ("needs a bias", "leave --virtual out")),
        ("steps: [{profile: {}}, {prune: {keep: 6}}, {profile: {}}, {prune: {keep: 7}}]", ("cannot keep 7", "has 6")),
        ("steps: [{retop: {}}, {recover: {losses: {objective: lm}}}]", ("top-1 Mixtral", "distill")),
        ("running: {device: abacus}\nsteps: [{retop: {}}]", ("abacus",)),
        ("running: {dtype: int4}\nsteps: [{retop: {}}]", ("int4", "bfloat16")),
        ("text: {length: 4096}\nsteps: [{retop: {}}]", ("4096", "context")),
        ("text: {traces: ['builtin:klingon']}\nsteps: [{retop: {}}]", ("klingon", "python")),
        ("text: {traces: []}\nsteps: [{retop: {}}]", ("no traces", "builtin:all")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_recipe_that_asks_for_the_impossible(
    rest: str, says: tuple[str, ...], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the first evaluation, not after an hour of work."""
    monkeypatch.setattr("moesurgeon.pipeline.evaluate.ready", pytest.fail)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"checkpoint: {MIXTRAL}\n{rest}\n")
    refused(USAGE, "run", path, "-o", out, says=says)


def test_recipe_that_is_no_file(out: Path, tmp_path: Path) -> None:
    refused(INPUT, "run", tmp_path / "nowhere.yaml", "-o", out, says=("cannot be read", "give the path"))
    refused(INPUT, "run", tmp_path, "-o", out, says=("cannot be read", "give the path"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(INPUT, "run", tmp_path / "binary.yaml", "-o", out, says=("not valid YAML",))


# ---- the command line itself


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["inspect"], ["retop", MIXTRAL], ["profile", MIXTRAL], ["run"], ["verify", MIXTRAL, MIXTRAL]],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str]) -> None:
    refused(USAGE, *arguments)
