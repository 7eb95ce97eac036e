"""Actors for tests of the pool, in a module of their own that a process imports quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import ray


class Doubler:
    def start(self):
        return ray.get_runtime_context().get_node_id()

    def run(self, number):
        if number < 0:
            raise ValueError(f"negative: {number}")
        time.sleep(0.02)
        return 2 * number, os.getpid()


class Mortal(Doubler):
    """Dies once on every third unit, and always on unit 13."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, number):
        mark = self.folder / str(number)
        if number == 13 or (number % 3 == 0 and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number


class Unable(Doubler):
    def start(self):
        raise FileNotFoundError("/nowhere/source")


class Stillborn(Doubler):
    """Dies while it starts."""

    def start(self):
        os.kill(os.getpid(), signal.SIGKILL)


class OddError(Exception):
    """Cannot be made again from its one argument."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Odd(Doubler):
    """Fails on unit 1 with an error that cannot be sent."""

    def run(self, number):
        if number == 1:
            raise OddError("one", "two")
        return super().run(number)
