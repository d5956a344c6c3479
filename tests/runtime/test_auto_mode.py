"""`--mode auto`: all modes of a model are candidates, and one answer holds for a model and a machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from hotcold.runtime import auto_mode
from hotcold.runtime.auto_mode import choose_mode
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.cpu.engine import CpuEngine as Engine


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hotcold" / "auto-mode"


def slowed(monkeypatch, fast: str) -> None:
    """All modes but one take their time."""
    import time

    decode = Engine.decode

    def slow(self, token):
        time.sleep(0 if self.mode == fast else 0.001)
        return decode(self, token)

    monkeypatch.setattr(Engine, "decode", slow)


@pytest.mark.parametrize("fast", ["dense", "exact", "predicted"])
def test_the_fastest_of_all_is_taken(bundle, monkeypatch, fast, capsys):
    slowed(monkeypatch, fast)
    assert choose_mode(ModelPath(bundle.path), 1) == fast
    err = capsys.readouterr().err
    assert "measuring dense, exact, predicted for tiny, once" in err
    assert f"auto mode: {fast}, the fastest (dense " in err


def test_a_copy_and_more_threads_get_the_same_answer(bundle, monkeypatch, tmp_path, records, capsys):
    slowed(monkeypatch, "dense")
    assert choose_mode(ModelPath(bundle.path), 1) == "dense"
    slowed(monkeypatch, "exact")
    capsys.readouterr()
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    assert choose_mode(ModelPath(copy), 2) == "dense"
    assert "measured earlier" in capsys.readouterr().err
    assert len(list(records.glob("*.json"))) == 1


def test_another_model_version_cpu_and_isa_are_measured_anew(bundle, make_bundle, monkeypatch, records):
    choose_mode(ModelPath(bundle.path), 1)
    choose_mode(ModelPath(make_bundle(seed=7).path), 1)
    monkeypatch.setattr(auto_mode, "__version__", "0.0.1")
    choose_mode(ModelPath(bundle.path), 1)
    monkeypatch.setattr(auto_mode, "cpu_name", lambda: "another")
    choose_mode(ModelPath(bundle.path), 1)
    monkeypatch.setenv("HOTCOLD_CPU_ISA", "generic")
    choose_mode(ModelPath(bundle.path), 1)
    assert len(list(records.glob("*.json"))) == 5


def test_a_gguf_file_is_known_by_its_content(bundle, tmp_path, records):
    path = shutil.copy(bundle.path / "tiny.powerinfer.gguf", tmp_path / "a.gguf")
    assert ModelPath(path).modes == ["exact", "predicted"]
    mode = choose_mode(ModelPath(path), 1)
    (record,) = records.glob("*.json")
    other = {"exact": "predicted", "predicted": "exact"}[mode]
    record.write_text(json.dumps({"mode": other}))
    assert choose_mode(ModelPath(shutil.move(path, tmp_path / "b.gguf")), 1) == other


@pytest.mark.parametrize("content", ["", "[]", '{"mode": "fast"}', '{"mode": ["exact"]}'])
def test_a_damaged_record_is_measured_anew(bundle, records, content):
    mode = choose_mode(ModelPath(bundle.path), 1)
    (record,) = records.glob("*.json")
    record.write_text(content)
    assert choose_mode(ModelPath(bundle.path), 1) in ("dense", "exact", "predicted")
    assert json.loads(record.read_text())["mode"] in ("dense", "exact", "predicted"), mode


def test_where_there_is_no_choice_nothing_is_measured(make_bundle, records, capsys):
    silu = make_bundle(activation="silu")
    assert Engine.load(silu.path, n_threads=1).mode == "dense"
    assert "auto mode: dense, the only mode that tiny offers" in capsys.readouterr().err
    assert not records.exists()


def test_a_cache_that_cannot_be_written_is_said(bundle, records, capsys):
    records.parent.parent.mkdir(parents=True)
    records.parent.write_text("in the way")
    assert choose_mode(ModelPath(bundle.path), 1) in ("dense", "exact", "predicted")
    assert "auto mode: could not save the result" in capsys.readouterr().err


def test_modes_that_do_not_fit_together_are_measured_one_by_one(bundle, monkeypatch):
    monkeypatch.setattr(auto_mode, "available_memory", lambda: 0)
    slowed(monkeypatch, "exact")
    assert choose_mode(ModelPath(bundle.path), 1) == "exact"


def test_processes_at_once_agree(bundle, records):
    code = (
        "import sys; from hotcold.runtime.cpu.engine import CpuEngine as Engine\n"
        "print(Engine.load(sys.argv[1], n_threads=1).mode)"
    )
    command = [sys.executable, "-c", code, str(bundle.path)]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    told = [racer.communicate() for racer in racers]
    (record,) = records.glob("*.json")
    assert {out.strip() for out, _ in told} == {json.loads(record.read_text())["mode"]}
    assert sum("measured now" in err for _, err in told) == 1
