"""How busy the machine is while a run trains, by MLflow's own monitors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

SECONDS = 10.0  # MLflow's own interval


class SystemMetrics:
    """Looks at processor, memory and GPUs between batches, so that its points wait in a run's journal as others do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked_at = clock()
        self._monitors = _monitors()
        for monitor in self._monitors:
            # the first look measures from the start of the process on, or nothing
            monitor.collect_metrics()

    def look(self, *, at_once: bool = False) -> dict[str, float]:
        """Return the metrics by MLflow's names (`system/cpu_utilization_percentage`), nothing before it is time."""
        if not at_once and self._clock() - self._looked_at < SECONDS:
            return {}
        self._looked_at = self._clock()
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
        return {f"system/{name}": float(value) for name, value in found.items()}


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor()]
    # without nvidia-ml-py or a GPU there is nothing to look at
    with contextlib.suppress(ImportError, RuntimeError):
        monitors.append(GPUMonitor())
    return monitors
