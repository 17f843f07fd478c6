"""The mode of batch invariance: where it is active, and where not."""

import asyncio
import threading

import pytest

import mokernels
from mokernels.invariance import is_batch_invariant


def test_it_is_active_inside_alone():
    assert not is_batch_invariant()
    with mokernels.batch_invariant():
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_it_may_be_entered_inside_itself():
    mode = mokernels.batch_invariant()
    with mode:
        with mode, mokernels.batch_invariant():
            assert is_batch_invariant()
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_an_error_leaves_it():
    with pytest.raises(ValueError, match="inside"), mokernels.batch_invariant():
        raise ValueError("inside")
    assert not is_batch_invariant()


def test_other_threads_begin_without():
    seen = []
    with mokernels.batch_invariant():
        thread = threading.Thread(target=lambda: seen.append(is_batch_invariant()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_tasks_inherit_it_and_keep_theirs():
    async def enter_and_wait(entered, done):
        with mokernels.batch_invariant():
            entered.set()
            await done.wait()

    async def main():
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(enter_and_wait(entered, done))
        await entered.wait()
        outside = is_batch_invariant()
        done.set()
        await task
        with mokernels.batch_invariant():
            return outside, await asyncio.create_task(asks())

    async def asks():
        return is_batch_invariant()

    assert asyncio.run(main()) == (False, True)
