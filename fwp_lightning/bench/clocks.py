"""Clocks: what a call costs in processor time, in wall time, and in time of a GPU; calls take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Function = Callable[[], object]
# a call that takes longer is measured in fewer rounds
SLOW_SECONDS = 0.3
SLOW_ROUNDS = 3
# more than the second-level cache of any GPU
FLUSHED_BYTES = 2**28
_WARM_UPS = 3


class Spread(NamedTuple):
    """Seconds of a call over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Clock:
    """Reads a clock of the host around repeated calls."""

    def __init__(self, name: str, now: Callable[[], float], at_least: float = 0.05) -> None:
        """``at_least``: the seconds that the calls of a round last together."""
        self.name, self.now, self.at_least = name, now, at_least

    def prepare(self, function: Function) -> Function:
        """Return what is called in place of ``function``."""
        return function

    def seconds(self, function: Function) -> float:
        """Return the mean seconds of a call."""
        calls, start = 0, self.now()
        while True:
            function()
            calls += 1
            elapsed = self.now() - start
            if elapsed >= self.at_least:
                return elapsed / calls


class CudaClock(Clock):
    """Events around single calls, what the cache held overwritten before each, so that all come from memory."""

    def __init__(self, name: str = "cuda", calls: int = 20) -> None:
        super().__init__(name, time.perf_counter)
        self.calls = calls
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, function: Function) -> float:
        """Return the median seconds of a call on the device, without the wait for the host where it is ahead."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.calls)]
        for before, after in events:
            self.flushed.zero_()
            before.record()
            function()
            after.record()
        torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) for before, after in events) / 1000


class GraphClock(CudaClock):
    """The same for a call that was recorded as a CUDA graph: no time of the host is in it."""

    def prepare(self, function: Function) -> Function:
        """Record the call; return its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


# time of the process on all its threads, and what passes meanwhile
CPU = Clock("cpu", time.process_time)
WALL = Clock("wall", time.perf_counter)


def interleaved(functions: Mapping[str, Function], clock: Clock, rounds: int) -> dict[str, Spread]:
    """Return the seconds of each function, taken in turns, so that all see the same machine."""
    prepared = {name: clock.prepare(function) for name, function in functions.items()}
    # warms up as well
    slow = {name: clock.seconds(function) > SLOW_SECONDS for name, function in prepared.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in prepared.items():
            if not (slow[name] and number >= SLOW_ROUNDS):
                times[name].append(clock.seconds(function))
    return {name: spread_of(seconds) for name, seconds in times.items()}


def spread_of(seconds: list[float]) -> Spread:
    """Return median, least, most and number of some measurements."""
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))
