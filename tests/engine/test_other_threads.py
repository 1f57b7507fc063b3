"""Tests that an error about random draws also names the user's threads, and not only the optimizer."""

from __future__ import annotations

import threading

from elastic.engine.randomness import other_threads


def test_threads_of_the_user_are_named() -> None:
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, name=name, daemon=True) for name in ("my-loader", "elastic-agent")]
    for thread in threads:
        thread.start()
    try:
        said = other_threads()
        assert "a thread of train_fn has drawn from torch's generator" in said
        assert "my-loader" in said
        assert "elastic-" not in said
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert "my-loader" not in other_threads()
