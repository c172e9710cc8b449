"""The part `retrieval`: optimiser steps of the retrieval task with their share of data and evaluation.

Two baselines: `released`, the released code's formulation with all the work that it does, used or not, and `plain`,
the same function with this package's modules, data drawn a block at a time and no graph in evaluation. Both write the
memory anew for each query of the evaluation, of which a part is measured: single sequences of `released`, drawn within
the time, one batch of a sequence's queries of `plain`.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import Tensor

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.bench.clocks import CPU, Clock, spread_of
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.released_retrieval import ReleasedTrainer
from fwp_lightning.bench.rules import Result, Settings
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.tasks.retrieval import BlockAdam, retrieval_loss

FORMULATIONS = ("released", "plain", "factored", "compiled")
SIZES = (20, 100, 600)
QUICK_SIZES = (5,)
# the paper's Setting 2 ends at S = 200
LARGEST_WITH_REPLACEMENT = 200
# the fwm rule writes the whole memory at each step: seconds a step in the plain formulation
LARGEST_FWM = 20
BATCH_SIZE = 32
# of the released code (experiments/figure5.yaml); its learning rate, 1e-4 there, takes no time
BATCH_SIZES = {"Schlag (2021)": 128}
CHECKED_STEPS = 3
# float32 against float64, over three steps of Adam; a wrong gradient changes the second loss by order 1e-2
TOLERANCE = 2e-3
# sums of some ten thousand terms in float64; LayerNorm divides by standard deviations of about 1e-2
EXACTLY = 1e-9

ROWS = {
    "Linear": AttentionConfig("sum", "elu", attention_norm="readout"),
    "DPFP-1": AttentionConfig("sum", "dpfp", nu=1, attention_norm="readout"),
    "DPFP-3": AttentionConfig("sum", "dpfp", nu=3, attention_norm="readout"),
    "Linear delta": AttentionConfig("delta", "elu", phi_norm="sum"),
    "DPFP-1 delta": AttentionConfig("delta", "dpfp", nu=1, phi_norm="sum"),
    "Schlag (2021)": AttentionConfig("fwm", "tanh"),
    "Schlag (2021) with DPFP-1": AttentionConfig("fwm", "dpfp", nu=1),
}


@dataclass
class Trainer:
    """One formulation of a row in training."""

    model: RetrievalModel
    optimizer: BlockAdam
    clock: Clock

    def take(self, block: RetrievalBlock) -> Tensor:
        """Take the block's steps as the task does; return the loss before each."""
        if self.model.is_compiled():
            self.optimizer.block = block
            self.optimizer.step()
            return self.optimizer.losses
        losses = []
        for keys, values, query, target in zip(*block, strict=True):
            self.optimizer.zero_grad()
            loss = retrieval_loss(self.model(keys, values, query), target).mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def seconds_a_step(self, data: RetrievalData, round_number: int) -> float:
        """Return the seconds of a step: its data, itself, and its share of the evaluation after every block."""
        block = data.block(round_number)
        drawn = self.clock.seconds(lambda: data.block(round_number)) / data.steps_per_block
        n_steps = data.steps_per_block if self.model.is_compiled() else 1
        taken = RetrievalBlock(*(x[:n_steps] for x in block))
        trained = self.clock.seconds(lambda: self.take(taken)) / n_steps
        return drawn + trained + self._evaluation(data, round_number) / data.steps_per_block

    @torch.no_grad()
    def _evaluation(self, data: RetrievalData, round_number: int) -> float:
        keys, values, queries, _, mask = data.evaluation(round_number)
        if self.model.compute != "plain":
            return self.clock.seconds(lambda: self.model(keys, values, queries))
        # as the released code: the memory is written anew for each query, a batch of them at a time
        n = min(data.batch_size, int(mask[0].sum()))
        many = keys[:1].expand(n, -1), values[:1].expand(n, -1), queries[0, :n, None]
        return self.clock.seconds(lambda: self.model(*many)) * int(mask.sum()) / n


def trainer_of(
    attention: AttentionConfig, n_keys: int, formulation: str, dtype: torch.dtype, clock: Clock
) -> Trainer | ReleasedTrainer:
    """Return a fresh trainer, the same parameters for every formulation."""
    torch.manual_seed(0)
    norm = "layer_norm" if attention.rule == "fwm" else "none"
    compute = "plain" if formulation == "released" else formulation
    model = RetrievalModel(attention, n_keys, readout_norm=norm, compute=compute).to(dtype)  # type: ignore[arg-type]
    if formulation == "released":
        return ReleasedTrainer(attention, model, clock)
    return Trainer(model, BlockAdam(model, lr=1e-3), clock)


def measure_retrieval(settings: Settings, sizes: Sequence[int] | None) -> Iterator[Result]:
    """Yield the formulations of every row at every size; process time of one thread.

    Each size has a process of its own: what a process has handed back decides how fast it gets memory again, and a step
    of the baselines takes hundreds of MB.
    """
    if settings.device != "cpu":
        settings.tell("retrieval is not measured: its training is compiled for the CPU")
        return
    if settings.quick:
        for n_keys in QUICK_SIZES:
            yield from _measure_size(n_keys, settings)
        return
    for n_keys in sizes or SIZES:
        # on Ctrl-C this process says what there is to say
        quietly = (signal.SIGINT, signal.SIG_DFL)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, quietly) as processes:
            try:
                results, told = processes.submit(_measured_alone, n_keys, settings.rounds).result()
            except BrokenProcessPool:
                results, told = [], [f"retrieval is not measured at S={n_keys}: its process was ended"]
        for line in told:
            settings.tell(line)
        yield from results


def _measured_alone(n_keys: int, rounds: int) -> tuple[list[Result], list[str]]:
    """Return the comparisons of a size, and what there was to tell."""
    torch.set_flush_denormal(True)
    told: list[str] = []
    return list(_measure_size(n_keys, Settings("cpu", rounds, told.append))), told


def _measure_size(n_keys: int, settings: Settings) -> Iterator[Result]:
    clock = Clock("cpu", CPU.now, at_least=0.02)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row, attention in ROWS.items():
            largest = {"delta": LARGEST_WITH_REPLACEMENT, "fwm": LARGEST_FWM}.get(attention.rule, n_keys)
            if n_keys <= largest:
                yield _compare(row, attention, n_keys, clock, settings)
    finally:
        torch.set_num_threads(before)


def _compare(row: str, attention: AttentionConfig, n_keys: int, clock: Clock, settings: Settings) -> Result:
    data = RetrievalData(
        n_keys=n_keys,
        replacement=attention.rule in ("delta", "fwm"),
        batch_size=BATCH_SIZES.get(row, BATCH_SIZE),
        max_queries=200,
        seed=0,
    )
    few = RetrievalBlock(*(x[:CHECKED_STEPS] for x in data.block(0)))
    exact = functools.partial(trainer_of, attention, n_keys, dtype=torch.float64, clock=clock)
    expected = exact("plain").take(few)
    trainers = {}
    for name in FORMULATIONS:
        build = functools.partial(trainer_of, attention, n_keys, name, torch.float32, clock)
        problem = _inexactness(exact, few) if name == "released" else None
        problem = problem or _disagreement(build, few, expected)
        if problem:
            settings.tell(f"{name} is not measured for {row} at S={n_keys}: {problem}")
        else:
            trainers[name] = build()
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(settings.rounds):
        for name, trainer in trainers.items():
            times[name].append(trainer.seconds_a_step(data, number))
    group = Group("retrieval", row, f"S={n_keys}", "float32", 1, "cpu", "step")
    return group, [Measurement(name, spread_of(seconds)) for name, seconds in times.items()]


def _inexactness(exact: Callable[[str], Trainer | ReleasedTrainer], few: RetrievalBlock) -> str | None:
    """Return how loss and gradients of the released formulation differ from ours in float64, or None."""
    ours, released = (_gradients_of(exact(name), few) for name in ("plain", "released"))
    for name, truth in ours.items():
        # more rows of embeddings there, which get no gradient
        missing = released[name][len(truth) :] if truth.ndim else released[name][None][1:]
        error = (released[name].flatten()[: truth.numel()] - truth.flatten()).abs().max() / truth.abs().max()
        if not error <= EXACTLY or missing.any():
            return f"its {name} is off by {float(error):.1e} in float64"
    return None


def _gradients_of(trainer: Trainer | ReleasedTrainer, few: RetrievalBlock) -> dict[str, Tensor]:
    """Return the loss of the first step and its gradients by parameter."""
    keys, values, query, target = (x[0] for x in few)
    if isinstance(trainer, ReleasedTrainer):
        loss = trainer.loss(keys, values, query, target)
    else:
        loss = retrieval_loss(trainer.model(keys, values, query), target).mean()
    parameters = trainer.model.pair_parameters
    used = {name: x for name in parameters._fields if (x := getattr(parameters, name)) is not None}
    # the released model has a map for write strengths under every rule
    found = torch.autograd.grad(loss, list(used.values()), materialize_grads=True)
    return {"loss": loss.detach(), **{f"dL/d{name}": x for name, x in zip(used, found, strict=True)}}


def _disagreement(build: Callable[[], Trainer | ReleasedTrainer], few: RetrievalBlock, expected: Tensor) -> str | None:
    """Return how the losses of the first steps differ from the plain formulation's in float64, or None."""
    try:
        losses = build().take(few).double()
    except ValueError as reason:
        return str(reason)
    error = ((losses - expected).abs() / expected).max()
    return None if error <= TOLERANCE else f"its losses are off by {float(error):.1e}"
