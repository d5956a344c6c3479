"""The generation loop over the reference engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hotcold.errors import InputError
from hotcold.runtime.generation.generate import Generation
from hotcold.runtime.generation.sampling import Sampler, SamplingParams
from hotcold.runtime.reference import ReferenceEngine

PROMPT = [5, 77, 123, 9, 300]
GREEDY = SamplingParams(temp=0)


@pytest.fixture
def engine(bundle) -> ReferenceEngine:
    return ReferenceEngine.load(bundle.path, "exact", n_ctx=32)


def test_greedy_equals_transformers(bundle, engine):
    generated = list(Generation(engine, PROMPT, Sampler(GREEDY), n_predict=12))
    wanted = bundle.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generated == wanted[0, len(PROMPT) :].tolist()


def test_counts(engine):
    generation = Generation(engine, PROMPT, Sampler(GREEDY), n_predict=4)
    assert len(list(generation)) == generation.n_generated == 4
    assert generation.n_prompt == 5 and generation.n_decoded == 3
    assert engine.position == 8 == engine.stats().tokens
    assert generation.stopped_by == "n_predict"
    assert generation.prompt_seconds > 0 and generation.decode_seconds > 0


def test_nothing_to_predict_still_reads_the_prompt(engine):
    generation = Generation(engine, PROMPT, Sampler(GREEDY), n_predict=0)
    assert list(generation) == [] and engine.position == len(PROMPT)


def test_stops_at_a_stop_id_and_leaves_it_out(engine):
    free = list(Generation(engine, PROMPT, Sampler(GREEDY), n_predict=12))
    stop = free[5]
    engine.reset()
    generation = Generation(engine, PROMPT, Sampler(GREEDY), stop_ids={stop})
    assert list(generation) == free[: free.index(stop)]
    assert generation.stopped_by == "stop_id"


def test_stops_when_the_context_is_full(engine):
    generation = Generation(engine, PROMPT, Sampler(GREEDY))
    # 32 positions: 5 of the prompt, 27 generated tokens, and one more that needs no place.
    assert len(list(generation)) == 28
    assert generation.stopped_by == "context" and engine.position == 32


def test_the_sampler_sees_prompt_and_generated_tokens(engine):
    class Spy(Sampler):
        seen: list[list[int]] = []  # noqa: RUF012 - one test, one list

        def sample(self, logits: np.ndarray, history=()) -> int:
            self.seen.append(list(history))
            return super().sample(logits, history)

    generated = list(Generation(engine, PROMPT, Spy(GREEDY), n_predict=3))
    assert Spy.seen == [PROMPT, PROMPT + generated[:1], PROMPT + generated[:2]]


def test_seeds(engine):
    def draw(seed):
        engine.reset()
        return list(Generation(engine, PROMPT, Sampler(SamplingParams(temp=2, seed=seed)), n_predict=20))

    assert draw(3) == draw(3) != draw(4)


def test_refused_prompts(engine):
    with pytest.raises(InputError, match="the prompt is empty"):
        Generation(engine, [], Sampler(GREEDY))
    with pytest.raises(
        InputError, match=r"does not fit in the context \(got 32, expected less than 32\); raise -c"
    ):
        Generation(engine, [1] * 32, Sampler(GREEDY))
    engine.prefill([1] * 30)
    with pytest.raises(InputError, match="expected less than 2"):
        Generation(engine, [1, 2], Sampler(GREEDY))
