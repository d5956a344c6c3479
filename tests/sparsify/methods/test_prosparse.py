"""The whole method on a tiny model: it repairs, it sparsifies, and it goes on after a kill."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hotcold import cli
from hotcold.errors import InputError, MismatchError
from hotcold.model import checkpoint
from hotcold.sparsify.config import L1, Checkpoints, Config, Learning, Loss, ModelSize, Text, WarmStart
from hotcold.sparsify.methods.prosparse import PHASES, prosparse, trained_model
from hotcold.sparsify.training.state import WorkFolder
from hotcold.sparsify.training.trainer import DivergedError

STEPS = 24


@pytest.fixture
def config(text_file):
    return Config(
        steps=STEPS,
        sequence=64,
        batch=4,
        micro_batch=4,
        quantize_from=0.75,
        warm_start=WarmStart(steps=6, lr=3e-3, warmup=2),
        l1=L1(((0.0, 4), (0.001, 8), (0.01, 16))),
        learning=Learning(lr=3e-3, warmup=2),
        text=(Text(str(text_file)),),
        heldout=str(text_file),
        heldout_tokens=1024,
        checkpoints=Checkpoints(every=10),
    )


def work_folder(path, config):
    return WorkFolder(path, {"model": "tiny", "config": config.digest()}, PHASES, config.checkpoints.keep)


def train(model_folder, tokenizer, config, path):
    work = work_folder(path, config)
    result = prosparse(lambda: checkpoint.load_model(str(model_folder)), tokenizer, config, work)
    return result, work.records()


def phase(records, name):
    return [record for record in records if record["phase"] == name]


def losses(records):
    return [(record["phase"], record["step"], record["loss"]) for record in records]


def test_both_phases_learn_and_every_term_is_logged(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, loss=Loss(lm=0.5, kl=1.0, ffn=0.1))
    result, records = train(model_folder, tokenizer, config, tmp_path)
    warm, main = phase(records, "warm-start"), phase(records, "train")
    assert [len(warm), len(main)] == [6, STEPS]
    assert warm[-1]["ffn"] < warm[0]["ffn"]
    assert main[-1]["lm"] < main[0]["lm"]
    schedule = config.l1_schedule()
    for step, record in enumerate(main, start=1):
        assert (record["step"], record["lambda"]) == (step, schedule(step))
        terms = 0.5 * record["lm"] + record["kl"] + 0.1 * record["ffn"] + record["lambda"] * record["l1"]
        assert record["loss"] == pytest.approx(terms, rel=1e-5)
        assert min(record["lm"], record["kl"], record["ffn"], record["l1"]) > 0
        assert len(record["sparsity_per_layer"]) == 2
        assert record["sparsity"] == pytest.approx(sum(record["sparsity_per_layer"]) / 2, abs=1e-4)
        assert (record["tokens"], record["tokens_per_second"] > 0) == (256, True)
    assert result.sparse.mean_sparsity > 0.4
    assert result.dense.mean_sparsity < 0.01


def test_the_logged_terms_are_the_models(model_folder, tokenizer, config, tmp_path):
    """The first step's terms, computed from the logits of a dense and of a ReLU model."""
    config = dataclasses.replace(
        config,
        steps=1,
        warm_start=WarmStart(),
        precision="fp32",
        quantize_from=1.0,
        l1=L1(((0.0, 0), (0.5, 1))),
    )
    config = dataclasses.replace(config, loss=Loss(lm=1.0, kl=1.0))
    from hotcold.sparsify.training.sources import training_data

    _, records = train(model_folder, tokenizer, config, tmp_path)
    dense, sparse = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    for layer in sparse.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    data = training_data(dense, tokenizer, config, tmp_path, None)
    ids = data.batch(4).ids
    seen = []
    for layer in sparse.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        p, q = dense(ids).logits.log_softmax(-1), sparse(ids, labels=ids)
    kl = (p.exp() * (p - q.logits.log_softmax(-1))).sum(-1).mean()
    l1 = sum(x.abs().mean() for x in seen)
    assert records[0]["lm"] == pytest.approx(q.loss.item(), rel=1e-4)
    assert records[0]["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert records[0]["l1"] == pytest.approx(l1.item(), rel=1e-4)
    assert records[0]["sparsity_per_layer"] == pytest.approx(
        [(x == 0).float().mean().item() for x in seen], abs=1e-4
    )


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 1},
        {"activation_checkpointing": True},
        {"pack": False, "micro_batch": 1},
    ],
)
def test_how_a_batch_is_cut_changes_nothing(model_folder, tokenizer, config, tmp_path, change):
    config = dataclasses.replace(config, precision="fp32", loss=Loss(lm=1.0, ffn=1.0), steps=8)
    whole = dataclasses.replace(config, pack=change.get("pack", True))
    expected = losses(train(model_folder, tokenizer, whole, tmp_path / "a")[1])
    found = losses(train(model_folder, tokenizer, dataclasses.replace(config, **change), tmp_path / "b")[1])
    assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in expected], rel=1e-4)


def test_a_stronger_l1_is_sparser(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, quantize_from=1.0, steps=60)
    shares = []
    for peak in (0.0, 1.0, 5.0):
        stages = L1(((0.0, 4), (peak, 8)))
        one = dataclasses.replace(config, l1=stages)
        shares.append(train(model_folder, tokenizer, one, tmp_path / str(peak))[0].sparse.mean_sparsity)
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.1


def test_a_target_sparsity_is_reached(model_folder, tokenizer, config, tmp_path):
    target = L1(((0.0, 4),), target_sparsity=0.75, start=0.05, multiplier=1.05)
    config = dataclasses.replace(config, l1=target, steps=150, quantize_from=1.0)
    _, records = train(model_folder, tokenizer, config, tmp_path)
    last = [record["sparsity"] for record in records[-30:]]
    assert sum(last) / len(last) == pytest.approx(0.75, abs=0.03)


def test_every_weight_can_learn(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, train="all", steps=3, warm_start=WarmStart(), quantize_from=1.0)
    result, _ = train(model_folder, tokenizer, config, tmp_path)
    before = checkpoint.load_model(str(model_folder))
    for (name, new), old in zip(result.model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(new, old), name


def test_same_seed_same_model(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, text=(*config.text, Text("generated")), steps=5)
    config = dataclasses.replace(config, generated=dataclasses.replace(config.generated, tokens=640))
    runs = [train(model_folder, tokenizer, config, tmp_path / name) for name in "ab"]
    assert losses(runs[0][1]) == losses(runs[1][1])
    for a, b in zip(*(result.model.parameters() for result, _ in runs), strict=True):
        assert torch.equal(a, b)


def test_stages_are_kept_as_models(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, checkpoints=Checkpoints(stages=True))
    result, _ = train(model_folder, tokenizer, config, tmp_path)
    work = work_folder(tmp_path, config)
    names = sorted(path.stem for path in (tmp_path / "stages").iterdir())
    assert names == ["stage-0", "stage-1", "stage-2", "trained", "warm-start"]
    from safetensors.torch import load_file

    last = trained_model(checkpoint.load_model(str(model_folder)), config, load_file(work.stage("trained")))
    for a, b in zip(last.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)


# Going on


COMMAND = [sys.executable, "-c", "import sys; from hotcold.cli import main; sys.exit(main())", "sparsify"]


def config_file(config, path):
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_killed_run_goes_on_as_if_it_had_not_been(model_folder, tokenizer, config, tmp_path):
    l1 = dataclasses.replace(config.l1, target_sparsity=0.7)  # so that the controller has to go on too
    config = dataclasses.replace(config, l1=l1, checkpoints=Checkpoints(every=3))
    whole = train(model_folder, tokenizer, config, tmp_path / "whole")
    file = config_file(config, tmp_path / "config.yaml")
    arguments = [
        "--model",
        model_folder,
        "--method",
        "prosparse",
        "--config",
        file,
        "--out",
        tmp_path / "out",
    ]
    log = tmp_path / "out.training" / "training.jsonl"
    with subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.DEVNULL) as child:
        while not log.is_file() or log.read_bytes().count(b"\n") < 14:
            assert child.poll() is None
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    assert cli.main(["sparsify", *map(str, arguments)]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    # Another process: its threads may take sums in another order, which is the last bit of a float.
    assert [at[:2] for at in losses(records)] == [at[:2] for at in losses(whole[1])]
    assert [at[2] for at in losses(records)] == pytest.approx([at[2] for at in losses(whole[1])], rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in whole[0].model.half().state_dict().items():
        torch.testing.assert_close(saved[name].half(), value, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("gone", [0, 3])
def test_any_of_the_last_states_is_good_to_go_on_from(model_folder, tokenizer, config, tmp_path, gone):
    """Whatever was lost from the end, the curve is the same, on both sides of the warm start's end."""
    config = dataclasses.replace(config, checkpoints=Checkpoints(every=6, keep=9))
    _, records = train(model_folder, tokenizer, config, tmp_path)
    work = work_folder(tmp_path, config)
    for saved in work.states()[len(work.states()) - 1 - gone :]:
        shutil.rmtree(saved.path)
    _, again = train(model_folder, tokenizer, config, tmp_path)
    assert losses(again) == losses(records)


# What is refused


def diverging(config):
    return dataclasses.replace(
        config, learning=Learning(lr=1e30, warmup=0, clip=1e30), warm_start=WarmStart()
    )


def test_a_loss_that_is_no_number_stops_the_run(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(diverging(config), checkpoints=Checkpoints(every=1), quantize_from=1.0)
    with pytest.raises(DivergedError) as error:
        train(model_folder, tokenizer, config, tmp_path)
    last = work_folder(tmp_path, config).last()
    assert f"the loss is not finite at step {last.step + 1}" in str(error.value)
    assert f"the last good state is {last.path}" in str(error.value)
    weights, _ = last.tensors()
    assert all(value.isfinite().all() for value in weights.values())


def test_a_model_of_another_size(model_folder, tokenizer, config, tmp_path):
    config = dataclasses.replace(config, model=ModelSize(30, 576, 1536))
    with pytest.raises(MismatchError, match="this config is for a model of another size"):
        train(model_folder, tokenizer, config, tmp_path)


def test_a_text_that_is_too_short(model_folder, tokenizer, config, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time")
    config = dataclasses.replace(config, text=(Text(str(tmp_path / "short.txt")),))
    with pytest.raises(
        InputError, match=r"short.txt: too little text \(got \d+ tokens, expected at least 64\)"
    ):
        train(model_folder, tokenizer, config, tmp_path / "work")


def test_states_of_another_run(model_folder, tokenizer, config, tmp_path):
    train(model_folder, tokenizer, dataclasses.replace(config, steps=1), tmp_path)
    with pytest.raises(MismatchError, match="the working folder of another run: its config differs"):
        train(model_folder, tokenizer, config, tmp_path)


def test_a_batch_that_cannot_be_shared(config):
    from hotcold.sparsify.methods.prosparse import check_processes

    with pytest.raises(
        InputError, match=r"batch: the batch cannot be shared \(got 4, expected a multiple of 3"
    ):
        check_processes(config, 3)
