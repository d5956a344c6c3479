"""`run`, `perplexity` and `bench` on whatever a model lies in, with their defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from split_files import split_gguf

from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.model import checkpoint
from hotcold.model.huggingface import HFCheckpoint

BENCH = ("-t", 1, "-r", 1, "-p", 8, "-n", 4, "--quality-tokens", 64, "--window", 32, "-o", "json")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hotcold(capsys, command: str, *arguments: object) -> tuple[str, str]:
    assert main([command, *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def generate(capsys, model: object, *options: object) -> str:
    arguments = ("-p", "a sparse", "-n", 8, "--temp", 0, "-t", 1, *options)
    return hotcold(capsys, "run", model, *arguments)[0]


def perplexity(capsys, model: object, text: Path, *options: object) -> dict:
    arguments = ("--text", text, "--tokens", 128, "--window", 32, "-t", 1, "--json", *options)
    return json.loads(hotcold(capsys, "perplexity", "-m", model, *arguments)[0])


def bench(capsys, model: object, text: Path, *options: object) -> dict:
    return json.loads(
        hotcold(capsys, "bench", "-m", model, "--text", text, *BENCH, *options)[0].splitlines()[-1]
    )


def sides(speed: dict) -> list[str]:
    return [row["side"] for row in speed["rows"] if "llama.cpp" not in row["side"]]


def exported(model: Path, out: Path, quant: str = "f16") -> Path:
    export_bundle(
        HFCheckpoint(model), out, name="m", fingerprint=checkpoint.fingerprint(str(model)), folder=model,
        options=ExportOptions(quant),
    )  # fmt: skip
    return out


def test_a_bundle_offers_all_its_modes(bundle, text_file, capsys):
    assert generate(capsys, bundle).startswith("a sparse")
    assert perplexity(capsys, bundle, text_file)["mode"] in ("dense", "exact", "predicted")


def test_a_bundle_without_predictors(bundle, text_file, capsys, tmp_path):
    plain = exported(bundle.parent / "model", tmp_path / "plain")
    assert generate(capsys, plain).startswith("a sparse")
    assert perplexity(capsys, plain, text_file)["mode"] in ("dense", "exact")
    exact = [perplexity(capsys, path, text_file, "--mode", "exact") for path in (plain, bundle)]
    assert exact[0] == exact[1]


def test_a_model_that_is_never_zero(make_dense_file, text_file, capsys, tmp_path):
    silu = exported(make_dense_file(hidden_act="silu").parent, tmp_path / "silu")
    file = silu / "m.gguf"
    assert generate(capsys, silu) == generate(capsys, file)
    assert perplexity(capsys, silu, text_file) == perplexity(capsys, file, text_file)
    speed = bench(capsys, file, text_file)
    assert sides(speed) == ["dense"]
    assert speed["ppl_dense"] == pytest.approx(speed["ppl_llama_cpp"], rel=2e-3)


@pytest.mark.parametrize("role", ["m.gguf", "m.powerinfer.gguf"])
def test_a_split_file_is_as_the_whole_one(bundle, text_file, capsys, tmp_path, role):
    whole = exported(bundle.parent / "model", tmp_path / "b") / role
    first = split_gguf(whole, tmp_path)
    assert generate(capsys, whole) == generate(capsys, first)
    assert perplexity(capsys, whole, text_file) == perplexity(capsys, first, text_file)
    described = [json.loads(hotcold(capsys, "inspect", path, "--json")[0]) for path in (whole, first)]
    names = [sorted(tensor["name"] for tensor in each["tensors"]) for each in described]
    assert names[0] == names[1]
    hotcold(capsys, "export", "--model", first, "--quant", "f16", "--out", tmp_path / "exported")
    hotcold(capsys, "convert", first, "--to", "bundle", "--out", tmp_path / "converted")
    for folder in ("exported", "converted"):
        hotcold(capsys, "verify", tmp_path / folder)


def test_a_split_file_beside_llama_cpp(bundle, text_file, capsys, tmp_path):
    whole = exported(bundle.parent / "model", tmp_path / "b") / "m.gguf"
    found = [bench(capsys, path, text_file) for path in (whole, split_gguf(whole, tmp_path))]
    for metric in (
        "ppl_dense",
        "ppl_llama_cpp",
        "bytes_per_token_dense",
        "bytes_per_token_llama_cpp_smallthinker",
    ):
        assert found[0][metric] == found[1][metric]


def spoilt(folder: Path, first: Path, how: str) -> Path:
    """A folder of its own with the parts of a split model, one thing about them wrong."""
    folder.mkdir()
    parts = [shutil.copy(path, folder) for path in sorted(first.parent.glob("*-of-*.gguf"))]
    match how:
        case "a part lost":
            Path(parts[1]).unlink()
        case "renamed":
            return Path(parts[0]).rename(folder / "m.gguf")
        case "second part":
            return Path(parts[1])
        case "swapped":
            Path(parts[0]).rename(folder / "x")
            Path(parts[1]).rename(parts[0])
            (folder / "x").rename(parts[1])
        case "joined":
            (folder / "all.gguf").write_bytes(b"".join(Path(part).read_bytes() for part in parts))
            return folder / "all.gguf"
    return Path(parts[0])


@pytest.mark.parametrize("how", ["a part lost", "renamed", "second part", "swapped", "joined"])
def test_parts_that_are_no_model_are_refused_in_one_line(bundle, text_file, capsys, tmp_path, how):
    (tmp_path / "parts").mkdir()
    first = split_gguf(bundle / "tiny.gguf", tmp_path / "parts")
    path = spoilt(tmp_path / "spoilt", first, how)
    for command in (
        ("run", path, "-p", "a"), ("perplexity", path, "--text", text_file),
        ("bench", path, "--text", text_file),
        ("inspect", path), ("convert", path, "--to", "bundle", "--out", tmp_path / "out"),
        ("export", "--model", path, "--out", tmp_path / "out"),
        ("run", path, "-p", "a", "--backend", "hybrid", "--device", "cpu", "--dry-run"),
    ):  # fmt: skip
        assert main([*map(str, command)]) == 2, command
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and str(path.parent) in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_converted_as_asked(bundle, text_file, capsys):
    model, as_asked = bundle.parent / "model", ("--quant", "f16")
    quality = perplexity(capsys, model, text_file, *as_asked)
    assert quality["mode"] in ("dense", "exact")
    assert sides(bench(capsys, model, text_file, *as_asked)) == ["dense", "exact"]
    assert generate(capsys, model, *as_asked) == generate(capsys, bundle, "--mode", quality["mode"])


@pytest.mark.parametrize("mode, offered", [("predicted", "dense or exact"), ("fast", "auto, dense, exact")])
def test_a_mode_that_is_not_there(bundle, text_file, capsys, tmp_path, mode, offered):
    plain = exported(bundle.parent / "model", tmp_path / "plain")
    assert main(["perplexity", str(plain), "--text", str(text_file), "--mode", mode]) == 2
    err = capsys.readouterr().err
    assert f"got {mode}, expected" in err and (mode == "fast" or offered in err)
    assert mode == "fast" or "pass them to `hotcold export`" in err


def test_llama_cpp_needs_a_dense_file(bundle, text_file, capsys):
    assert (
        main(["bench", str(bundle / "tiny.powerinfer.gguf"), "--text", str(text_file), *map(str, BENCH)]) == 2
    )
    assert "got dense, expected exact or predicted" in capsys.readouterr().err
