"""How fast the memories and what is made of them are here, against the plain formulation and against others' work.

What is compared is measured in turns, so that all see the same machine; whoever disagrees with the float64 definition
gets no number. On a CPU one thread is measured in processor time, which varies less than wall time where others work
too, and all threads in wall time. On a GPU calls are timed by events with a cold cache, alone and as a CUDA graph.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fwp_lightning import compiled
from fwp_lightning.bench import decoding, records, retrieval, rules, training
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.rules import Result, Settings
from fwp_lightning.bench.shapes import shapes_for
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project
from fwp_lightning.registry import did_you_mean
from fwp_lightning.tracking import Origin

PARTS = ("rules", "fused", "growth", "retrieval", "training", "generation")
DEVICES = ("cpu", "cuda")
# share of the cores that others may keep busy unremarked
BUSY = 0.3


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    parts: list[str] | None = None
    """None: all."""
    device: str = "cpu"
    shapes: list[str] | None = None
    """Of the part rules; None: all that are meant for the device."""
    sizes: list[int] | None = None
    """S of the part retrieval."""
    rounds: int = 5
    peers: bool = False
    """Fetch and build the peers that can be had."""
    quick: bool = False
    """Tiny sizes, to see that it works; nothing is saved."""
    save: bool = True


def run(request: Request, project: Project, origin: Origin, tell: Callable[[str], None] = print) -> int:
    """Measure, tell every comparison, and save it as soon as it is there; raise ``UserError`` for what cannot be."""
    parts = _checked(request)
    if request.device == "cpu":
        torch.set_flush_denormal(True)
    cores = records.cores_here()
    settings = Settings(
        request.device,
        1 if request.quick else request.rounds,
        _once(tell),
        threads=(1,) if cores == 1 or request.quick else (1, cores),
        fetch=request.peers,
        quick=request.quick,
        clocks=rules.cuda_clocks() if request.device == "cuda" else (),
    )
    machine = records.machine_of(request.device)
    path = project.results / "benchmarks" / f"{request.device}.csv"
    saves = request.save and not request.quick
    tell(f"{machine['machine']}, {machine['cores']} cores, {machine['isa']}, torch {machine['torch']}")
    if (load := os.getloadavg()[0]) > BUSY * cores:
        tell(f"other work keeps this machine busy (load {load:.1f}): what is wall time says little, ratios say more")
    for group, measurements in _measured(parts, request, settings):
        for line in lines_of(group, measurements):
            tell(line)
        if saves:
            records.save(path, records.rows_of(group, measurements, machine, origin))
    if saves:
        tell(f"saved in {path}; `fwp report bench` draws it, `fwp report readme` puts it into README.md")
    return 0


def _checked(request: Request) -> list[str]:
    for part in request.parts or []:
        if part not in PARTS:
            raise UserError(f"--parts {part}: unknown part {part!r}. {did_you_mean(part, list(PARTS))}")
    if request.device not in DEVICES:
        raise UserError(f"--device {request.device}: unknown device. {did_you_mean(request.device, list(DEVICES))}")
    if request.device == "cuda" and not torch.cuda.is_available():
        reason = compiled.why_no_device() or "this torch is built without CUDA"
        raise UserError(f"--device cuda cannot be measured here: {reason}; leave the option out.")
    shapes_for(request.shapes, request.device)
    # in their own order, each once
    return [part for part in PARTS if request.parts is None or part in request.parts]


def _once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that tells the same thing once."""
    return functools.cache(tell)


def _measured(parts: list[str], request: Request, settings: Settings) -> Iterator[Result]:
    measure: dict[str, Callable[[], Iterator[Result]]] = {
        "rules": lambda: rules.measure_rules(settings, shapes_for(request.shapes, request.device)),
        "fused": lambda: rules.measure_fused(settings),
        "growth": lambda: rules.measure_growth(settings),
        "retrieval": lambda: retrieval.measure_retrieval(settings, request.sizes),
        "training": lambda: training.measure_training(settings),
        "generation": lambda: decoding.measure_generation(settings),
    }
    for part in parts:
        yield from measure[part]()


def lines_of(group: Group, measurements: list[Measurement]) -> list[str]:
    """Return a comparison as lines: milliseconds with the least and the most, the ratio to the first, the roof."""
    unit = "thread" if group.threads == 1 else "threads"
    head = f"{group.part}: {group.rule}, {group.shape}, {group.passes}, {group.dtype}"
    lines = [f"\n{head}, {group.threads} {unit}, {group.clock} time"]
    if not measurements:
        return [*lines, "  nothing could be measured"]
    first = measurements[0]
    roof = next((m.gigaflop / m.spread.median for m in measurements if m.backend == rules.GEMM and m.gigaflop), None)
    width = max(len(m.backend) for m in measurements)
    for m in measurements:
        median, low, high = (1000 * x for x in m.spread[:3])
        text = f"  {m.backend:{width}} {median:10.3f} ms ({low:.3f} to {high:.3f})"
        if m.backend != rules.GEMM:
            text += f"  {first.spread.median / m.spread.median:7.1f}x"
        if m.gigaflop:
            rate = m.gigaflop / m.spread.median
            text += f"  {rate:6.1f} GF/s" + (f", {100 * rate / roof:3.0f} % of gemm" if roof else "")
        if m.memory is not None:
            text += f"  {m.memory:.1f} MiB"
        lines.append(text)
    return lines
