"""Two processes give the losses of one with the same global batch, and go on after a kill."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from hotcold.sparsify.config import L1, Checkpoints, Config, Learning, Loss, Text, WarmStart

MAIN = "import sys; from hotcold.cli import main; sys.exit(main())"


@pytest.fixture
def config(text_file):
    return Config(
        steps=12,
        sequence=32,
        batch=4,
        micro_batch=2,
        pack=False,  # so that processes see different numbers of tokens
        precision="fp32",
        quantize_from=0.75,
        warm_start=WarmStart(steps=3),
        l1=L1(((0.0, 2), (0.001, 4), (0.1, 8))),
        loss=Loss(lm=0.5, kl=1.0, ffn=0.1),
        learning=Learning(lr=1e-3, warmup=2),
        text=(Text(str(text_file)),),
        heldout=str(text_file),
        heldout_tokens=256,
        checkpoints=Checkpoints(every=3),
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(model_folder, config, folder, processes):
    """`hotcold sparsify` under torchrun, or alone."""
    folder.mkdir(exist_ok=True)
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    given = {key: value for key, value in content.items() if value is not None}
    given["l1"] = {key: value for key, value in given["l1"].items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    (folder / "main.py").write_text(MAIN)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
    arguments = [
        "sparsify",
        "--model",
        model_folder,
        "--method",
        "prosparse",
        "--config",
        folder / "config.yaml",
    ]
    command = [
        sys.executable, *(launcher if processes > 1 else []), folder / "main.py", *arguments,
        "--out", folder / "out",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(child):
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors.decode()[-2000:]


def records(folder):
    log = folder / "out.training" / "training.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def losses(found):
    return {(record["phase"], record["step"]): record["loss"] for record in found}


def test_two_processes_give_the_losses_of_one_and_survive_a_kill(model_folder, config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(model_folder, config, one, 1))
    with start(model_folder, config, two, 2) as child:
        while len(records(two)) < 9:
            assert child.poll() is None, child.stderr.read().decode()[-2000:]
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGKILL)
        child.stderr.read()
    finish(start(model_folder, config, two, 2))
    expected, found = records(one), records(two)
    assert len(found) == 15
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    for name in ("lm", "kl", "l1", "sparsity", "gradient"):
        ours, theirs = ([record[name] for record in run] for run in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert sum(record["tokens"] for record in found) == sum(record["tokens"] for record in expected)
