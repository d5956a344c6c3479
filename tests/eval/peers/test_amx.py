"""llama.cpp builds whose AMX code ends the process: found out in another one, where it can happen."""

from __future__ import annotations

import signal
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from hotcold.eval.peers import llama_cpp


@pytest.fixture
def machine(monkeypatch):
    """A machine, a model and what becomes of the process that tries them; returns whether AMX is used."""

    def make(info: bytes, types: list[str], status: int) -> tuple[list[bool], int]:
        probes = []

        def run(command, **_):
            probes.append(command)
            return CompletedProcess(command, status)

        tensors = {str(n): SimpleNamespace(type=name) for n, name in enumerate(types)}
        monkeypatch.setattr(llama_cpp, "_amx_fails", None)
        monkeypatch.setattr(llama_cpp, "open_gguf", lambda path: SimpleNamespace(tensors=tensors))
        monkeypatch.setattr(llama_cpp.subprocess, "run", run)
        library = SimpleNamespace(llama_print_system_info=lambda: info)
        return [llama_cpp._uses_amx("m.gguf", library) for _ in range(2)], len(probes)

    return make


WITH, WITHOUT = b"CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1 | ", b"CPU : AVX512 = 1 | REPACK = 1 | "


@pytest.mark.parametrize(
    ("info", "types", "status", "used", "probes"),
    [
        (WITHOUT, ["F32", "Q4_0"], -signal.SIGILL, True, 0),
        (WITH, ["F32", "F16"], -signal.SIGILL, True, 0),
        (WITH, ["F32", "Q4_0"], 0, True, 1),
        (WITH, ["F32", "Q4_0"], 1, True, 1),  # a model that fails otherwise: its own error is to be seen
        (WITH, ["F32", "Q4_0"], -signal.SIGILL, False, 1),
    ],
)
def test_amx_is_tried_once_and_left_out_where_it_fails(machine, capsys, info, types, status, used, probes):
    assert machine(info, types, status) == ([used, used], probes)
    assert llama_cpp.without_amx() is not used
    assert capsys.readouterr().err.count("AMX") == (not used)
