"""Nothing that hotcold did not write is ever replaced, deleted or appended to, by any command that writes.

Every command is driven against every kind of place that is not its own: it ends with status 2 and one line,
and all bytes are as they were. Then the other side: each command replaces what it wrote itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import handmade
import pytest

from hotcold import storage
from hotcold.cli import main
from hotcold.errors import FormatError, HotcoldError, StorageError
from hotcold.eval.synthetic.shapes import SHAPES, Synthetic, write_synthetic
from hotcold.identify import REPORT, identify, mark
from hotcold.model import checkpoint
from hotcold.ownership import beside, check_file, check_growing, check_replaceable
from hotcold.predictor.bundle import PredictorBundle
from hotcold.sparsify.training.state import WorkFolder

Made = dict[str, Path]


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By kind: what hotcold writes, for a hand-made model in `hf`, which it did not write."""
    folder = tmp_path_factory.mktemp("made")
    paths = {kind: folder / kind for kind in ("hf", *FOLDERS, *FILES, "report", "text", "demo", "training")}
    paths["hf"].mkdir()
    handmade.checkpoint(paths["hf"])
    handmade.tokenizer(paths["hf"])
    config = handmade.model_config() | {"hidden_act": "relu"}
    (paths["hf"] / "config.json").write_bytes(handmade.as_json(config))
    index = paths["hf"] / "model.safetensors.index.json"  # transformers wants a key more
    index.write_bytes(handmade.as_json({"metadata": {}} | json.loads(index.read_bytes())))
    rng = random.Random(0)
    lines = (" ".join(rng.choices(["ab", "a", "b", "aba"], k=40)) for _ in range(4000))
    paths["text"].write_text("\n\n".join(lines))
    for name, command in COMMANDS.items():
        kind = command.kind
        if name in MAKERS and isinstance(arguments := command.act(paths, paths[kind]), list):
            assert run(*arguments) == 0, name
    model = checkpoint.load_model(str(paths["hf"]))
    checkpoint.save(model, checkpoint.load_tokenizer(str(paths["hf"])), paths["checkpoint"])
    paths["report"].write_text(json.dumps(REPORT))
    paths["demo"].mkdir()
    (paths["demo"] / "hotcold.json").write_text(json.dumps(mark("demo")))
    WorkFolder(paths["training"], {}, [])
    return paths


class Command:
    """What writes a `kind`: arguments of the command line, or a call."""

    def __init__(self, kind: str, act: Callable[[Made, Path], list | None]) -> None:
        self.kind, self.act = kind, act

    def __call__(self, made: Made, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        """Exit status and what it said of an error."""
        capsys.readouterr()
        try:
            arguments = self.act(made, out)
        except HotcoldError as error:
            return 2, f"{error}\n"
        status = 0 if arguments is None else run(*arguments)
        return status, capsys.readouterr().err


def convert(to: str, *options: object) -> Command:
    def act(made: Made, out: Path) -> list:
        return ["convert", made["bundle"], *options, "--to", to, "--out", out]

    return Command(to, act)


def _train(made: Made, out: Path) -> list:
    return ["train-predictors", "--traces", made["traces"], "--epochs", 1, "-t", 1, "--out", out]


def _export(made: Made, out: Path) -> list:
    parts = ["--predictors", made["predictors"], "--quant", "f16"]
    return ["export", "--model", made["hf"], *parts, "--out", out]


def _collect(made: Made, out: Path) -> list:
    sizes = ["--tokens", 600, "--window", 16, "-t", 1]
    return ["collect-traces", "--model", made["hf"], "--text", made["text"], *sizes, "--out", out]


def _sparsify(made: Made, out: Path) -> list:
    sizes = ["--tokens", 1024, "--generated", 0]
    return ["sparsify", "--model", made["hf"], "--text", made["text"], *sizes, "--out", out]


def _pretrained(made: Made, out: Path) -> list:
    return ["sparsify", "--model", made["hf"], "--method", "pretrained", "--out", out]


def _shift(made: Made, out: Path) -> list:
    sizes = ["--text", made["text"], "--tokens", 64, "--window", 8, "--try", "0.01", "--budget", 9]
    return ["shift-thresholds", "--model", made["hf"], *sizes, "--out", out]


def _save_checkpoint(made: Made, out: Path) -> None:
    model = checkpoint.load_model(str(made["hf"]))
    checkpoint.save(model, checkpoint.load_tokenizer(str(made["hf"])), out)


COMMANDS = {
    "collect-traces": Command("traces", _collect),
    "train-predictors": Command("predictors", _train),
    "export": Command("bundle", _export),
    "sparsify": Command("checkpoint", _sparsify),
    "sparsify pretrained": Command("checkpoint", _pretrained),
    "shift-thresholds": Command("checkpoint", _shift),
    "demo": Command("demo", lambda made, out: ["demo", "--model", made["gguf"], "--out", out]),
    **{f"convert {to}": convert(to) for to in ("bundle", "predictors", "model-pt", "activation")},
    **{f"convert {to}": convert(to) for to in ("gguf", "powerinfer")},
    "convert gpuidx": convert("gpuidx", "--vram-budget", 1),
    "bench": Command("report", lambda made, out: ["bench", "--bundle", made["bundle"], "--save", out]),
    "bench-gpu": Command(
        "report",
        lambda made, out: ["bench-gpu", "--bundle", made["bundle"], "--device", "cpu", "--save", out],
    ),
    "bench-gpu-all": Command("report", lambda made, out: ["bench-gpu-all", "--device", "cpu", "--save", out]),
    "save": Command("predictors", lambda made, out: PredictorBundle.load(made["predictors"]).save(out)),
    "save_pretrained": Command(
        "predictors", lambda made, out: PredictorBundle.load(made["predictors"]).save_pretrained(out)
    ),
    "checkpoint.save": Command("checkpoint", _save_checkpoint),
}
FILES = ("gguf", "powerinfer", "gpuidx")
FOLDERS = ("traces", "predictors", "bundle", "model-pt", "activation", "checkpoint")
MAKERS = ("collect-traces", "train-predictors", "export", *(f"convert {to}" for to in FILES),
          "convert model-pt", "convert activation")  # fmt: skip
GROWING = ("traces", "demo")
LONG = ("demo", "bench", "bench-gpu", "bench-gpu-all", "sparsify pretrained")  # for other tests to run


def web_app(path: Path, made: Made, kind: str) -> None:
    """A folder with every name that hotcold uses."""
    path.mkdir()
    for name in ("manifest.json", "config.json", "run.json", "training.json", "hotcold.json"):
        (path / name).write_text('{"name": "a web app", "version": 1, "files": {}}')
    (path / "steps.jsonl").write_text("{}\n")
    (path / "index.html").write_text("<h1>mine</h1>")


def broken(path: Path, made: Made, kind: str) -> None:
    path.mkdir()
    for name in ("manifest.json", "config.json", "run.json", "training.json", "hotcold.json"):
        (path / name).write_text("{")


def thesis(path: Path, made: Made, kind: str) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def hf_checkpoint(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made["hf"], path)


def another_kind(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made["model-pt" if kind != "model-pt" else "activation"], path)


def another_kind_that_grows(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made["training"], path)


def link_to_another(path: Path, made: Made, kind: str) -> None:
    web_app(path.with_name("elsewhere"), made, kind)
    path.symlink_to(path.with_name("elsewhere"))


def link_to_itself(path: Path, made: Made, kind: str) -> None:
    path.symlink_to(path)


def file(path: Path, made: Made, kind: str) -> None:
    path.write_text("mine")


def pipe(path: Path, made: Made, kind: str) -> None:
    os.mkfifo(path)


def with_a_link_in_it(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made[kind], path)
    thesis(path.with_name("elsewhere"), made, kind)
    (path / "link").symlink_to(path.with_name("elsewhere"))


def git_clone(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made[kind], path)
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


def with_a_file_added(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made[kind], path)
    (path / "notes.txt").write_text("mine")


def with_a_folder_added(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made[kind], path)
    (path / "mine").mkdir()


def with_a_file_changed(path: Path, made: Made, kind: str) -> None:
    shutil.copytree(made[kind], path)
    largest = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)


def with_its_mark_changed(path: Path, made: Made, kind: str) -> None:
    """The list of files says that the user's own is one of them, but is not signed anew."""
    shutil.copytree(made[kind], path)
    (path / "notes.txt").write_text("mine")
    marked = next(p for p in path.rglob("*.json") if p.name in ("hotcold.json", "manifest.json"))
    values = json.loads(marked.read_text())
    values["files"]["notes.txt"] = {"bytes": 4, "sha256": handmade.sha256(b"mine")}
    marked.write_text(json.dumps(values))


ANY = [web_app, broken, thesis, hf_checkpoint, another_kind, another_kind_that_grows, link_to_another,
       link_to_itself, file, pipe]  # fmt: skip
MARKED = [git_clone, with_a_file_added, with_a_folder_added, with_a_file_changed, with_its_mark_changed]


def cases() -> Iterator[tuple[str, Callable]]:
    for name, command in COMMANDS.items():
        if command.kind in (*FILES, "report"):
            continue
        places = [*ANY, with_a_link_in_it, *([] if command.kind in GROWING else MARKED)]
        yield from ((name, place) for place in places)


def everything(root: Path) -> dict[str, object]:
    """All below `root`: links by where they lead, files by content."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        key = str(path.relative_to(root))
        found[key] = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


def refused(command: Command, made: Made, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must end in one line that names `out`, and change nothing around it."""
    before = everything(out.parent)
    status, said = command(made, out, capsys)
    assert status == 2 and said.count("\n") == 1, said
    assert everything(out.parent) == before
    return said


@pytest.mark.parametrize(
    ("name", "place"), list(cases()), ids=lambda value: getattr(value, "__name__", value)
)
def test_a_folder_that_is_not_ours(name, place, made, tmp_path, capsys):
    out = tmp_path / "out"
    place(out, made, COMMANDS[name].kind)
    assert str(tmp_path) in refused(COMMANDS[name], made, out, capsys)


@pytest.mark.parametrize("name", [name for name, c in COMMANDS.items() if c.kind not in (*FILES, "report")])
@pytest.mark.parametrize("place", ["home", "root"])
def test_your_home_folder_even_if_it_is_empty(name, place, made, tmp_path, capsys, monkeypatch):
    home = tmp_path / "me"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    said = refused(COMMANDS[name], made, home, capsys) if place == "home" else ""
    if place == "root":
        status, said = COMMANDS[name](made, Path("/"), capsys)
        assert status == 2
    assert "name a folder in it" in said


def text_file(path: Path, made: Made, kind: str) -> None:
    path.write_text("mine")


def json_file(path: Path, made: Made, kind: str) -> None:
    path.write_text('{"name": "mine", "version": 1}')


def gguf_of_others(path: Path, made: Made, kind: str) -> None:
    path.write_bytes(handmade.gpu_index_bytes() if kind == "gpuidx" else handmade.model_gguf())


def file_of_another_kind(path: Path, made: Made, kind: str) -> None:
    shutil.copy(made["gguf" if kind != "gguf" else "gpuidx"], path)


def link_to_a_file(path: Path, made: Made, kind: str) -> None:
    text_file(path.with_name("elsewhere"), made, kind)
    path.symlink_to(path.with_name("elsewhere"))


PLACES = [
    text_file,
    json_file,
    gguf_of_others,
    file_of_another_kind,
    link_to_a_file,
    link_to_itself,
    thesis,
    pipe,
]


@pytest.mark.parametrize("name", [name for name, c in COMMANDS.items() if c.kind in (*FILES, "report")])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_file_that_is_not_ours(name, place, made, tmp_path, capsys):
    out = tmp_path / "out"
    place(out, made, COMMANDS[name].kind)
    assert str(tmp_path) in refused(COMMANDS[name], made, out, capsys)


@pytest.mark.parametrize(
    ("name", "suffix", "place"),
    [
        *(("train-predictors", ".partial", place) for place in (web_app, thesis, link_to_another, file)),
        *(("sparsify", ".training", place) for place in (web_app, thesis, link_to_another, file)),
        *(("shift-thresholds", ".curve.jsonl", place) for place in (text_file, json_file, thesis, pipe)),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_what_lies_beside(name, suffix, place, made, tmp_path, capsys):
    place(tmp_path / f"out{suffix}", made, "training")
    assert (
        f"out{suffix}" in refused(COMMANDS[name], made, tmp_path / "out", capsys) or place is link_to_another
    )


@pytest.mark.parametrize(
    "content", ["notes", '{"run": 1}', '{"run": 1, "point": 2}\n{"a": 1}\n', "{}\n", "[]\n"]
)
def test_a_journal_of_others_gets_no_line(content, tmp_path):
    (tmp_path / "out.curve.jsonl").write_text(content)
    with pytest.raises(StorageError, match="hotcold did not write it"):
        check_file(tmp_path / "out.curve.jsonl", "curve")


@pytest.mark.parametrize(
    "content", ["", '{"run": [1], "point": {}}\n', '{"run": [1], "point": {}}\n{"run": ["a']
)
def test_our_own_journal_goes_on(content, tmp_path):
    (tmp_path / "out.curve.jsonl").write_text(content)
    check_file(tmp_path / "out.curve.jsonl", "curve")


@pytest.mark.parametrize("name", ["sparsify", "sparsify pretrained", "shift-thresholds", "export"])
def test_the_model_is_never_the_victim(name, made, tmp_path, capsys):
    """Not even where hotcold has written it itself."""
    for kind in ("hf", "checkpoint"):
        own = shutil.copytree(made[kind], tmp_path / kind)
        refused(COMMANDS[name], made | {"hf": own}, own, capsys)


def test_a_source_of_convert_is_never_the_victim(made, tmp_path, capsys):
    def said(source: Path, to: str, out: Path) -> str:
        return refused(
            Command(to, lambda *_: ["convert", source, "--to", to, "--out", out]), made, out, capsys
        )

    gguf = Path(shutil.copy(made["gguf"], tmp_path / "m.gguf"))
    (tmp_path / "other name.gguf").hardlink_to(gguf)
    (tmp_path / "link.gguf").symlink_to(gguf)
    for out in (gguf, tmp_path / "other name.gguf", tmp_path / "link.gguf"):
        assert "the output is, or contains, an input" in said(gguf, "gguf", out)
    bundle = shutil.copytree(made["bundle"], tmp_path / "b")
    assert "the output is, or contains, an input" in said(bundle, "bundle", bundle)
    assert "the output is, or contains, an input" in said(bundle / "predictors", "bundle", bundle)
    file = next(path for path in bundle.glob("*.gguf") if "powerinfer" not in path.name)
    assert "a folder that hotcold writes as a whole (bundle)" in said(bundle, "gguf", file)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in LONG])
def test_each_command_replaces_its_own(name, made, tmp_path, capsys):
    out, command = tmp_path / "out", COMMANDS[name]
    for _ in range(2):
        assert command(made, out, capsys)[0] == 0
        found = identify(out)
        assert (found.kind, found.ours) == (command.kind, True)
    if command.kind not in (*FILES, *GROWING):
        assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.training", "out.curve.jsonl"}
        link = tmp_path / "link"
        link.symlink_to(out)
        check_replaceable(link, command.kind)  # a link to what is ours is ours


def test_every_kind_is_told(made):
    for kind in (*FOLDERS, *FILES, "report", "demo", "training"):
        assert (identify(made[kind]).kind, identify(made[kind]).ours) == (kind, True)
    assert (identify(made["hf"]).kind, identify(made["hf"]).ours) == ("checkpoint", False)
    assert identify(made["bundle"] / "predictors").kind == "predictors"
    assert identify(made["hf"] / "nothing").kind is None


def test_the_mark_is_what_the_document_says(made):
    for kind in ("predictors", "checkpoint", "model-pt", "activation"):
        folder = made[kind]
        place = folder / ("hotcold/hotcold.json" if kind == "activation" else "hotcold.json")
        others = [path for path in folder.rglob("*") if path.is_file() and path != place]
        files = {
            str(path.relative_to(folder)): {
                "bytes": path.stat().st_size,
                "sha256": handmade.sha256(path.read_bytes()),
            }
            for path in others
        }
        values = {"format": "hotcold-folder", "version": 1, "kind": kind, "files": files}
        assert json.loads(place.read_text()) == handmade.signed(values)


@pytest.mark.parametrize("kind", ["gguf", "bundle", "traces", ["predictors"], None])
def test_a_mark_of_no_such_kind_is_none(kind, tmp_path):
    values = {"format": "hotcold-folder", "version": 1, "kind": kind, "files": {}}
    (tmp_path / "hotcold.json").write_text(json.dumps(handmade.signed(values)))
    assert identify(tmp_path).kind is None


def test_hashing_large_files_shows_progress(made, monkeypatch, capsys):
    monkeypatch.setattr("hotcold.identify._LONG", 0)
    monkeypatch.setattr("hotcold.progress._LOG_EVERY_S", 0.0)
    check_replaceable(made["predictors"], "predictors")
    assert mark("predictors", made["predictors"])["files"]
    assert "hash: 0/0 MB" in capsys.readouterr().err


def test_a_bundle_after_the_document_is_ours(tmp_path):
    handmade.bundle(tmp_path)
    check_replaceable(tmp_path, "bundle")
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"name": "renamed"}))
    with pytest.raises(StorageError, match="hotcold did not write it"):
        check_replaceable(tmp_path, "bundle")


def test_predictors_of_the_version_before_are_replaced(made, tmp_path):
    old = shutil.copytree(made["predictors"], tmp_path / "old")
    (old / "hotcold.json").unlink()
    check_replaceable(old, "predictors")
    (old / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"old/notes\.txt: hotcold did not write this"):
        check_replaceable(old, "predictors")


def test_an_old_folder_without_a_mark_is_named_as_such(made, tmp_path):
    old = shutil.copytree(made["checkpoint"], tmp_path / "old")
    (old / "hotcold.json").unlink()
    with pytest.raises(
        StorageError, match=r"did not write it, or an older version .*; choose another folder, or m"
    ):
        check_replaceable(old, "checkpoint")


def test_unfinished_training_is_cleared_away_but_for_what_is_not_ours(made, tmp_path, capsys):
    partial = tmp_path / "p.partial"
    partial.mkdir()
    (partial / "training.json").write_text('{"format": "hotcold-partial"}')
    for name in ("layer-000.safetensors", "layer-backup.safetensors", "notes.txt"):
        (partial / name).write_text("mine")
    assert COMMANDS["train-predictors"](made, tmp_path / "p", capsys)[0] == 0
    assert everything(partial) == {"layer-backup.safetensors": b"mine", "notes.txt": b"mine"}


def test_an_old_state_is_cleared_away_but_for_what_is_not_ours(tmp_path, capsys):
    import torch

    work, tensors = WorkFolder(tmp_path / "w", {}, ["l1"], keep=1), {"a": torch.zeros(2)}
    for step in (1, 2, 3):
        work.save("l1", step, tensors, tensors, {})
        if step == 1:
            (tmp_path / "w/state-l1-000001/notes.txt").write_text("mine")
    assert [saved.step for saved in work.states()] == [3]
    assert everything(tmp_path / "w/state-l1-000001") == {"notes.txt": b"mine"}
    assert "state-l1-000001: folder not removed" in capsys.readouterr().err


def test_a_cache_of_synthetic_models(made, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", handmade.model_config() | {"hidden_act": "relu"})
    synthetic = Synthetic("tiny")
    out = tmp_path / f"{synthetic.name}-{synthetic.fingerprint[:8]}"
    for place in (web_app, hf_checkpoint, file):
        place(out, made, "bundle")
        before = everything(tmp_path)
        with pytest.raises(StorageError):
            write_synthetic(synthetic, tmp_path)
        assert everything(tmp_path) == before
        out.unlink() if out.is_file() else shutil.rmtree(out)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"Not a directory|a file, not a folder"):
        check_replaceable(tmp_path / "file" / "out", "bundle")
    with pytest.raises(StorageError, match="name too long"):
        check_growing(tmp_path / ("x" * 300), "traces")
    if os.geteuid() != 0:  # whom nothing is forbidden
        (tmp_path / "locked").mkdir(mode=0o555)
        for check, kind in ((check_replaceable, "bundle"), (check_growing, "traces"), (check_file, "gguf")):
            with pytest.raises(StorageError, match="no permission to write here"):
                check(tmp_path / "locked" / "out", kind)


def test_a_link_that_leads_nowhere_yet(made, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "new")
    assert COMMANDS["convert predictors"](made, tmp_path / "link", capsys)[0] == 0
    assert (tmp_path / "link").is_symlink() and identify(tmp_path / "new").kind == "predictors"


def test_what_lies_beside_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert beside(".", ".partial") == tmp_path / "here.partial"
    assert beside("a/..", ".x") == tmp_path / "here.x"


def test_nothing_is_written_into_what_was_written_as_a_whole(tmp_path):
    whole = tmp_path / "whole"
    with storage.atomic_directory(whole, "checkpoint") as folder:
        (folder / "config.json").write_text("{}")
    for check, kind in (
        (check_replaceable, "predictors"),
        (check_growing, "traces"),
        (check_file, "report"),
    ):
        for place in ("new", "deep/new", "config.json/x"):
            with pytest.raises(StorageError, match=r"writes as a whole|a file, not a folder"):
                check(whole / place, kind)
    assert [path.name for path in sorted(whole.iterdir())] == ["config.json", "hotcold.json"]


def test_a_broken_file_of_a_known_name_does_not_hide_a_checkpoint(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "run.json").write_text("[]")
    assert identify(tmp_path).kind == "checkpoint"
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match="not a JSON object"):
        identify(tmp_path)
