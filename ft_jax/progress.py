"""What a run notes of itself: the best evaluation so far, the time that its steps take, and whether it is to stop."""

import contextlib
import dataclasses
import signal
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils


@dataclasses.dataclass
class Best:
    """The best evaluation so far; higher is better for accuracy, lower for everything else."""

    metric: str
    value: float | None = None
    step: int = 0

    def take(self, metrics, step):
        """Notes a better value; returns whether it was one."""
        value, sign = metrics[self.metric], 1 if self.metric == "accuracy" else -1
        if self.value is not None and sign * value <= sign * self.value:
            return False
        self.value, self.step = value, step
        return True


class Clock:
    """Steps per second without the first step (which compiles), evaluation and saving."""

    def __init__(self):
        self.first, self.seconds, self.steps, self._last, self._start = None, 0.0, 0, None, time.perf_counter()

    def tick(self, metrics):
        if self.first is None:
            jax.block_until_ready(metrics)
            self.first, self._last = time.perf_counter() - self._start, time.perf_counter()
        else:
            self.steps += 1

    @contextlib.contextmanager
    def paused(self, metrics):
        jax.block_until_ready(metrics)
        self.seconds += time.perf_counter() - self._last
        yield
        self._last = time.perf_counter()

    @property
    def rate(self):
        return self.steps / self.seconds if self.steps and self.seconds else None

    @property
    def total(self):
        return time.perf_counter() - self._start


class Stop:
    """Notes SIGTERM instead of dying of it, so that a step ends and is saved; of several processes, if any of them was told."""

    def __init__(self):
        self._noted, self._before = False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_):
        self._noted = True

    def asked(self, together):
        """Whether to stop now. Several processes have to agree, which they do where ``together`` is true for all."""
        if jax.process_count() == 1:
            return self._noted
        return together and bool(multihost_utils.process_allgather(np.asarray(self._noted)).any())
