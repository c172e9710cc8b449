"""What rows will cost: one update of each, timed on this machine, whatever machine their configuration asks for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fwp_lightning.experiment import Run
from fwp_lightning.peak_memory import needed_memory_mb, peak_memory_mb, reset_peak_memory
from fwp_lightning.sweep.training import SILENT_TRAINER, RunCLI, quiet_lightning
from fwp_lightning.tasks.updates import Update
from fwp_lightning.tracking import cpu_name

# of a micro-batch on a CPU: enough for matrices to be the work, few enough to wait for
CPU_WORDS = 512
TIMES = 2


@dataclass(frozen=True)
class Cost:
    """A row's measured update, and what a run of it takes at that speed."""

    row: str
    seconds: float
    """Of one update on one device."""
    updates: int
    devices: int
    device: str
    memory_mb: float | None
    """Peak of an update on one device; None where the system does not say."""
    words: int
    """Of an update on one device."""
    unit: str
    part: str
    """What was measured of it; empty: all."""

    @property
    def hours(self) -> float:
        """Hours of all devices together that a run takes."""
        return self.seconds * self.updates * self.devices / 3600

    @property
    def hours_of(self) -> str:
        """Hours of what they are."""
        return "CPU-hours" if self.device.startswith("cpu") else "GPU-hours"

    def sentence(self) -> str:
        """Return the cost in one line."""
        part = f"; measured on {self.part}, the others are taken to cost as much" if self.part else ""
        memory = "" if self.memory_mb is None else f", {self.memory_mb / 1024:.1f} GiB"
        return (
            f"{self.row}: {self.seconds:.2f} s an update ({self.words / self.seconds:,.0f} {self.unit}/s"
            f"{memory}), {self.updates:,} updates on {self.devices}: {self.hours:,.1f} "
            f"{self.hours_of} a run at the speed of {self.device}{part}"
        )


def total_of(costs: list[Cost], runs: Iterable[Run]) -> str:
    """Return what all ``runs`` take together, evaluations left out, where each is like one of the measured rows."""
    by_row = {cost.row: cost for cost in costs}
    hours = sum(by_row[name_of(run)].hours for run in runs if name_of(run) in by_row)
    return f"all runs: {hours:,.1f} {costs[0].hours_of} of training at that speed; evaluations are not in it"


def name_of(run: Run) -> str:
    """Return what is measured once for all its seeds: a row at a point."""
    return f"{run.row}, {run.point}" if run.point else run.row


def on_this_machine(run: Run) -> Run:
    """Return a run that can be built here: where the accelerators it asks for are missing, on one device there is."""
    trainer = run.config["trainer"]
    here = torch.cuda.device_count()
    asked = trainer.get("devices", 1)
    if trainer.get("accelerator") == "cpu" or (here and not (isinstance(asked, int) and asked > here)):
        return run
    one = {"accelerator": "gpu" if here else "cpu", "devices": 1, "strategy": "auto"}
    precision = {} if here else {"precision": "32-true"}
    return dataclasses.replace(run, config={**run.config, "trainer": {**trainer, **one, **precision}})


def measure(run: Run) -> Cost | None:
    """Time an update of a run; None where its task cannot do that without its data."""
    with quiet_lightning():
        cli = RunCLI(on_this_machine(run).config, {"logger": False, **SILENT_TRAINER}, [])
    measurable: Callable[..., Update] | None = getattr(cli.model, "measurable_update", None)
    if measurable is None:
        return None
    device = cli.trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    asked = run.config["trainer"].get("devices", 1)
    devices = asked if isinstance(asked, int) and asked > 0 else 1
    update = measurable(cli.datamodule, device, str(cli.trainer.precision), devices)
    part = update.sequences if on_gpu else max(1, min(update.sequences, CPU_WORDS // update.sequence_length))
    reset_peak_memory()
    seconds = _seconds_of(lambda: update.micro_batch(part), device) * update.sequences / part * update.micro_batches
    seconds += _seconds_of(update.step, device)
    return Cost(
        row=name_of(run),
        seconds=seconds,
        updates=cli.model.max_steps,
        devices=devices,
        device=f"{device.type} ({torch.cuda.get_device_name(device) if on_gpu else cpu_name()})",
        memory_mb=peak_memory_mb(device) if on_gpu else _memory_mb(update, part),
        words=update.words,
        unit=update.unit,
        part="" if part == update.sequences else f"{part} of {update.sequences} sequences",
    )


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that work takes once it is warm; on a CPU those that it takes where nobody else works."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.perf_counter if device.type == "cuda" else time.process_time
    threads = 1 if device.type == "cuda" else torch.get_num_threads()
    started = now()
    for _ in range(TIMES):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (now() - started) / TIMES / threads


def _memory_mb(update: Update, part: int) -> float | None:
    """The memory of an update on a CPU: what sequences need beyond weights grows with their number."""
    few, many = (needed_memory_mb(lambda n=n: update.micro_batch(n), "cpu") for n in (part, 2 * part))  # type: ignore[misc]
    if few is None or many is None:
        return None
    each = max(many - few, 0.0) / part
    return update.fixed_mb + few + each * (update.sequences - part)
