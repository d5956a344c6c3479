"""Who may compute: in the order of callers, and whoever leaves the line does not hold it up."""

from __future__ import annotations

import threading
import time

import pytest

from hotcold.errors import UnsupportedError
from hotcold.runtime.turns import Turns


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_caller_that_comes_back_at_once_waits_for_the_others():
    turns, own, order = Turns(), threading.Lock(), []

    def call(name):
        with turns.take(threading.Lock()):
            order.append(name)

    threads = [threading.Thread(target=call, args=name) for name in "abc"]
    with turns.take(own):
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda n=number: len(turns._line) == n + 2)
    with turns.take(own):
        order.append("z")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "c", "z"]


def test_an_error_or_an_interrupt_gives_the_turn_back(monkeypatch):
    turns, held = Turns(), threading.Lock()
    with pytest.raises(KeyError), turns.take(held):
        raise KeyError
    with monkeypatch.context() as patch:
        patch.setattr(turns._moved, "wait_for", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), turns.take(held):
            raise AssertionError("not reached")
    busy = pytest.raises(UnsupportedError, match="another thread is using this sequence")
    with turns.take(held), busy, turns.take(held):
        raise AssertionError("not reached")
    with turns.take(held):
        pass
