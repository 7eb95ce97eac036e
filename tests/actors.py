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
            time.sleep(0.5)  # until the answer to the unit before is out, which would be lost with the process
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


class Slow(Doubler):
    """Takes its time; notes in a folder when and where each unit began and ended."""

    def __init__(self, folder, seconds):
        self.folder, self.seconds = Path(folder), seconds

    def run(self, number):
        self._note(number, "began")
        time.sleep(self.seconds)
        self._note(number, "ended")
        return 2 * number

    def _note(self, number, what):
        mark = self.folder / f"{number}-{what}-{os.getpid()}"
        mark.write_text(ray.get_runtime_context().get_node_id())


class Scorer:
    """Scores a job's blocks in a search; notes every one, and dies at some of them, each time once.

    Args:
        folder: for its notes.
        deadly: (job, rung) at which it dies.
    """

    def __init__(self, folder, deadly=()):
        self.folder, self.deadly = Path(folder), set(deadly)

    def start(self):
        pass

    def run(self, ranks, active, split, task, content, documents):
        (rung,) = documents
        mark = self.folder / f"died-{ranks['job']}-{rung}"
        if (ranks["job"], rung) in self.deadly and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.folder / "scored").open("a") as file:
            file.write(f"{ranks['job']} {rung}\n")
        time.sleep(1.0)
        return rung


class Sleeper(Doubler):
    """Sleeps for as long as a unit of the simulator says, and longer for another mixture than the one before."""

    def __init__(self, switch):
        self.switch, self.held = switch, None

    def run(self, work, tag):
        time.sleep(work.seconds + self.switch * (self.held not in (None, work.mixture)))
        self.held = work.mixture
        return os.getpid()
