"""What rows will cost: one update of each, timed on this machine, whatever machine their configuration asks for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fwp_lightning.experiment import Run
from fwp_lightning.sweep.training import SILENT_TRAINER, RunCLI, quiet_lightning
from fwp_lightning.tracking import cpu_name


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
    """Peak of the measured update; None where it is not known."""

    def sentence(self) -> str:
        """Return the cost in one line."""
        hours = self.seconds * self.updates * self.devices / 3600
        unit = "CPU" if self.device.startswith("cpu") else "GPU"
        memory = "" if self.memory_mb is None else f", {self.memory_mb / 1024:.1f} GiB"
        return (
            f"{self.row}: {self.seconds:.2f} s an update{memory}, {self.updates:,} updates on "
            f"{self.devices}: {hours:,.1f} {unit}-hours a run at the speed of {self.device}"
        )


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
    time_update = getattr(cli.model, "time_update", None)
    if time_update is None:
        return None
    device = cli.trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = time_update(cli.datamodule, device, cli.trainer.precision)
    asked = run.config["trainer"].get("devices", 1)
    return Cost(
        row=run.row,
        seconds=seconds,
        updates=cli.model.max_steps,
        devices=asked if isinstance(asked, int) else 1,
        device=f"{device.type} ({torch.cuda.get_device_name(device) if on_gpu else cpu_name()})",
        memory_mb=torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else None,
    )
