"""Locks keep their order, nest in their own thread, and say who holds and waits."""

from __future__ import annotations

import threading

import pytest

from skep.errors import InternalError
from skep.locks import Holding, Lock, Order, holders


def mine(*names: str) -> list[Holding]:
    return [holding for holding in holders() if holding.lock in names]


def test_a_lock_nests_in_its_own_thread_and_excludes_others() -> None:
    lock = Lock("test-nest", Order.BOARD)
    entered = threading.Event()

    def other() -> None:
        with lock:
            entered.set()

    thread = threading.Thread(target=other, name="other")
    with lock:
        with lock:
            thread.start()
            while not mine("test-nest")[0].waiting:
                entered.wait(0.001)
        assert lock.held()
        assert mine("test-nest") == [Holding("test-nest", threading.get_ident(), (thread.ident,))]
        assert not entered.wait(0.02)
    thread.join(5)
    assert entered.is_set()
    assert not lock.held()
    assert mine("test-nest") == []


def test_the_wrong_order_raises_at_once_and_holds_nothing() -> None:
    board, clock, sibling = Lock("b", Order.BOARD), Lock("c", Order.CLOCK), Lock("b2", Order.BOARD)
    with clock, pytest.raises(InternalError, match=r"^lock 'b' \(order 20\) taken while holding order 50$"):
        board.__enter__()
    with board, pytest.raises(InternalError, match="taken while holding order 20"):
        sibling.__enter__()
    with board, clock:
        pass
    assert not board.held()
    assert not sibling.held()


def test_an_exception_releases() -> None:
    lock = Lock("x", Order.BOARD)
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert not lock.held()
    with Lock("y", Order.VM), lock:
        pass


def test_releasing_what_is_not_held() -> None:
    with pytest.raises(InternalError, match="released by a thread that does not hold it"):
        Lock("z", Order.BOARD).__exit__(None, None, None)
