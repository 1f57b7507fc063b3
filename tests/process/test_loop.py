from __future__ import annotations

import socket
import threading

from elastic.agent.loop import Loop


def test_what_can_be_read_is_acted_on_until_forgotten() -> None:
    loop, heard = Loop(), []
    near, far = socket.socketpair()
    with near, far:
        loop.watch(far, lambda: heard.append(far.recv(10)))
        near.send(b"one")
        loop.turn()
        near.send(b"two")
        loop.forget(far)
        loop.set_timer(0, lambda: heard.append(b"timer"))
        loop.turn()
    assert heard == [b"one", b"timer"]


def test_writing_is_waited_for_only_when_asked() -> None:
    loop, acts = Loop(), []
    near, far = socket.socketpair()
    with near, far:
        loop.watch(near, lambda: acts.append("wrong"))
        loop.watch(near, lambda: acts.append("writable"), writable=True)
        loop.turn()
        loop.watch(near, lambda: acts.append("wrong"))
        loop.set_timer(0, lambda: acts.append("timer"))
        loop.turn()
    assert acts == ["writable", "timer"]


def test_the_timer_goes_off_once_and_the_last_one_set_counts() -> None:
    loop, acts = Loop(), []
    loop.set_timer(600, lambda: acts.append("replaced"))
    loop.set_timer(0, lambda: acts.append("timer"))
    assert loop.timing()
    loop.turn()
    assert acts == ["timer"]
    assert not loop.timing()


def test_timers_of_different_names_do_not_disturb_each_other() -> None:
    loop, acts = Loop(), []
    loop.set_timer(0, lambda: (acts.append("one"), loop.clear_timer("two")), "one")
    loop.set_timer(0, lambda: acts.append("cleared"), "two")
    loop.set_timer(600, lambda: acts.append("later"), "three")
    loop.turn()
    assert acts == ["one"]
    assert loop.timing("three")


def test_other_threads_hand_their_acts_to_the_loops_thread_in_order() -> None:
    loop, seen = Loop(), []

    def hand_over() -> None:
        for number in range(3):
            loop.post(lambda number=number: seen.append((number, threading.current_thread())))

    thread = threading.Thread(target=hand_over)
    thread.start()
    while len(seen) < 3:
        loop.turn()
    thread.join()
    assert seen == [(number, threading.current_thread()) for number in range(3)]


def test_an_act_may_set_the_next_timer() -> None:
    loop, acts = Loop(), []
    loop.set_timer(0, lambda: loop.set_timer(0, lambda: acts.append("second")))
    loop.turn()
    loop.turn()
    assert acts == ["second"]
