"""Progressive L1 on a toy Llama of 4 layers, against no L1 and against a fixed factor; some minutes.

`pytest -m slow -s tests/sparsify/test_progressive.py` prints the table of docs/sparsify.md. The dense model
must have learnt what it can: in one that still learns fast, sparsity costs least when it comes first.
"""

import dataclasses
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from hotcold.model import checkpoint
from hotcold.sparsify.config import L1, Checkpoints, Config, Learning, Loss, Text, WarmStart
from hotcold.sparsify.methods.prosparse import PHASES, prosparse
from hotcold.sparsify.training.state import WorkFolder
from hotcold.text import documents, split, token_stream

SEEDS = (0, 1, 2)
STEPS = 300
PEAK = 2.5
DENSE_STEPS = 1500
SCHEDULES = {
    "no L1": L1(),
    "fixed, a fifth": L1(((0.0, 0), (PEAK / 5, 1))),
    "fixed": L1(((0.0, 0), (PEAK, 1))),
    "progressive": L1(((0.0, 30), (PEAK / 10, 60), (PEAK / 2, 150), (PEAK / 2, 180), (PEAK, 270))),
}
BASE = Config(
    steps=STEPS,
    train="all",
    sequence=64,
    batch=8,
    micro_batch=8,
    precision="fp32",
    loss=Loss(lm=1.0, kl=0.0),
    learning=Learning(lr=1e-3, warmup=20),
    heldout_tokens=16384,
    text=(Text("stdlib"),),
    warm_start=WarmStart(),
    checkpoints=Checkpoints(every=1000),
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator((d.text for d in documents("stdlib")), trainer)
    return tokenizer


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory):
    """A SiLU model trained on the same text until it hardly gets better."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("toy")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / DENSE_STEPS)) / 2
    )
    stream = token_stream(split(documents("stdlib"), "train"), tokenizer, 900_000)
    ids = torch.cat([torch.from_numpy(part).long() for part in stream])
    generator = torch.Generator().manual_seed(0)
    for _ in range(DENSE_STEPS):
        starts = torch.randint(len(ids) - 64, (16,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in starts.tolist()])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    checkpoint.save(model, tokenizer, folder / "dense")
    return folder / "dense"


@pytest.fixture(scope="module")
def outcomes(dense, tokenizer, tmp_path_factory):
    """Mean over seeds of (loss on held-out text, sparsity) by schedule."""
    found = {}
    for name, l1 in SCHEDULES.items():
        runs = []
        for seed in SEEDS:
            config = dataclasses.replace(BASE, l1=l1, seed=seed)
            work = WorkFolder(tmp_path_factory.mktemp("work"), {}, PHASES)
            quality = prosparse(lambda: checkpoint.load_model(str(dense)), tokenizer, config, work).sparse
            runs.append((torch.tensor(quality.perplexity).log().item(), quality.mean_sparsity))
        found[name] = torch.tensor(runs).mean(0).tolist()
        print(f"{name:<14} loss {found[name][0]:.4f}  sparsity {found[name][1]:.2%}", flush=True)
    return found


@pytest.mark.slow
def test_progressive_l1_is_sparser_at_little_loss(outcomes):
    (plain, before), (loss, after) = outcomes["no L1"], outcomes["progressive"]
    assert after >= before + 0.20
    assert loss <= 1.05 * plain


@pytest.mark.slow
def test_progressive_l1_loses_less_than_its_last_factor_from_the_start(outcomes):
    assert outcomes["progressive"][0] < outcomes["fixed"][0]
