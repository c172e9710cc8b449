"""How fast the memories and the retrieval task are here: ratios against the plain formulation, measured interleaved.

Times are process CPU time of one thread: on a shared machine they vary less than wall time, and ratios less still.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention import AttentionConfig
from fwp_lightning.data.retrieval import RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.tasks.retrieval import retrieval_loss

ROUNDS = 5
COMPUTE: tuple[Literal["plain", "factored", "auto"], ...] = ("plain", "factored", "auto")


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement of a rule: batch, steps, heads, features, values."""

    name: str
    sizes: tuple[int, int, int, int, int]


# the paper's small and medium language models, and the small one with DPFP-3
SHAPES = [
    Shape("S1 B8 H8 T256 16x16", (8, 256, 8, 16, 16)),
    Shape("S2 B8 H8 T384 32x32", (8, 384, 8, 32, 32)),
    Shape("S4 B8 H8 T256 96x16", (8, 256, 8, 96, 16)),
]
RETRIEVAL = {
    "Linear": AttentionConfig("sum", "elu", attention_norm="readout"),
    "DPFP-1": AttentionConfig("sum", "dpfp", nu=1, attention_norm="readout"),
    "DPFP-3": AttentionConfig("sum", "dpfp", nu=3, attention_norm="readout"),
    "Linear delta": AttentionConfig("delta", "elu", phi_norm="sum"),
    "DPFP-1 delta": AttentionConfig("delta", "dpfp", nu=1, phi_norm="sum"),
}


def cpu_seconds(function: Callable[[], object], at_least: float = 0.05) -> float:
    """Return the CPU seconds of one call, the mean over enough calls to last ``at_least`` seconds."""
    calls, start = 0, time.process_time()
    while True:
        function()
        calls += 1
        elapsed = time.process_time() - start
        if elapsed >= at_least:
            return elapsed / calls


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median CPU seconds of each function, taken in turns, so that all see the same machine."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(cpu_seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_rule(rule: str, shape: Shape) -> dict[str, float]:
    """Return forward-and-backward seconds per backend; a backend that disagrees with the reference gets no number."""
    b, t, h, n_features, d_value = shape.sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    q, k, v = draw(b, t, h, n_features), draw(b, t, h, n_features), draw(b, t, h, d_value) - 0.5
    inputs = [(x / x.sum(-1, keepdim=True)).requires_grad_() for x in (q, k)] + [v.requires_grad_()]
    inputs += [draw(b, t, h).requires_grad_()] if rule == "delta" else []
    apply = ops.delta_rule if rule == "delta" else ops.sum_rule

    def step(backend: str) -> list[Tensor]:
        o, _ = apply(*inputs, backend=backend)
        assert o is not None
        return [o, *torch.autograd.grad(o.square().sum(), inputs)]

    expected = step("reference")
    for backend in ops.backends_of(rule, k):
        for ours, theirs in zip(step(backend), expected, strict=True):
            # float32 sums of up to T terms; a wrong formula is off by order 1
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))
    return interleaved({name: functools.partial(step, name) for name in ops.backends_of(rule, k)}, rounds=3)


def measure_retrieval(config: AttentionConfig, n_keys: int) -> dict[str, float]:
    """Return seconds per optimiser step, its share of data and evaluation included, for each formulation.

    The plain formulation evaluates as the released code does: the memory is written anew for each query.
    """
    data = RetrievalData(n_keys=n_keys, replacement=config.rule == "delta", max_queries=200, seed=0)
    block_share = cpu_seconds(lambda: data.block(0), at_least=0) / data.steps_per_block
    keys, values, query, target = (x[0] for x in data.block(0))
    batch = data.evaluation(0)
    evaluations_per_step = 1 / data.steps_per_block
    seconds: dict[str, float] = {}
    for compute in COMPUTE:
        torch.manual_seed(0)
        model = RetrievalModel(config, n_keys, compute=compute)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def step(model: RetrievalModel = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            retrieval_loss(model(keys, values, query), target).mean().backward()
            optimizer.step()

        if compute == "plain":
            evaluation = _seconds_query_by_query(model, batch)
        else:
            with torch.no_grad():
                evaluation = cpu_seconds(functools.partial(model, batch.keys, batch.values, batch.queries))
        step()
        slow = n_keys > 200 and compute == "plain"
        train = statistics.median(cpu_seconds(step, 0 if slow else 0.2) for _ in range(2 if slow else ROUNDS))
        seconds[compute] = train + block_share + evaluation * evaluations_per_step
    return seconds


@torch.no_grad()
def _seconds_query_by_query(model: RetrievalModel, batch: Sequence[Tensor]) -> float:
    """CPU seconds of an evaluation that writes the memory once per query: one chunk of 32 queries, scaled up."""
    keys, values, queries, _, mask = batch
    n = min(32, int(mask[0].sum()))
    once = cpu_seconds(
        lambda: model(keys[:1].expand(n, -1), values[:1].expand(n, -1), queries[0, :n, None]), at_least=0
    )
    return once * int(mask.sum()) / n


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="fwp bench", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 600], help="S of the retrieval task")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, CPU time\n")
    print("Rules, forward and backward, float32 (milliseconds; ratio against the time-step loop)")
    for rule in ("sum", "delta"):
        for shape in SHAPES:
            times = measure_rule(rule, shape)
            cells = [f"{name} {1e3 * s:8.2f} ({times['reference'] / s:5.1f}x)" for name, s in times.items()]
            print(f"  {rule:5}  {shape.name:20}  " + "   ".join(cells), flush=True)
    print("\nRetrieval, optimiser steps per second with data and evaluation (ratio against the plain formulation)")
    for n_keys in options.sizes:
        for name, config in RETRIEVAL.items():
            if config.rule == "delta" and n_keys > 200:
                continue  # the paper's Setting 2 ends at S = 200
            times = measure_retrieval(config, n_keys)
            cells = [f"{how} {1 / s:8.1f} ({times['plain'] / s:6.1f}x)" for how, s in times.items()]
            print(f"  S={n_keys:<4} {name:13} " + "   ".join(cells), flush=True)
    return 0
