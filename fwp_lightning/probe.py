"""Looks inside fast weight memories while a run validates: a Lightning callback that keeps running means, no tensors.

Off unless a configuration names it, in one place::

    trainer.callbacks: [{class_path: fwp_lightning.probe.MemoryProbe}]

It looks at the first sequences of the first batches of a validation, which dropout leaves alone (of the retrieval task
at those of its first evaluation), and writes and reads the layers' memories once more, pair by pair where it looks.

Processor time of one thread, as a share of the steps between two looks at the default interval: 2.9 to 3.0 % of the
language model of ``memory_lm`` in the profile smoke; of compiled retrieval with overwriting 0.2 % (S = 200) to 3.4 %
(sum rule, S = 20), where a look takes 6 to 22 ms. At every validation, which ``every: 1`` asks for, it would be 11 to
170 %. A run with fewer than 50 validations has one look, at its end, whatever share of it that is.

Shapes: N sequences looked at, T steps, H heads, K features, V values.
"""

from __future__ import annotations

import csv
import inspect
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fwp_lightning.attention import FastWeightMemory, MemoryState
from fwp_lightning.models.retrieval import RetrievalModel

log = logging.getLogger(__name__)

TABLE = "probes.csv"
COLUMNS = ("step", "layer", "head", "statistic", "x", "y", "mean", "std", "n")
# steps of a sequence that are looked at, spaced evenly on a log scale
N_POSITIONS = 16
# validations from one look to the next where none is asked for: 100 steps of compiled retrieval take no longer than a
# look, or half as long
EVERY_OF_RETRIEVAL = 50
BETA_BINS = 10
QKV = ("q", "k", "v")
# of the table's statistics, what stands in a run's metrics as a mean over layers and heads: its last x, and once a
# validation, so that a run has few keys
TRACKED = (
    "before_cosine",
    "after_cosine",
    "remove_to_write",
    "self_gain",
    "z_phi_q",
    "W_norm",
    "effective_rank",
    "beta",
)


class Place(NamedTuple):
    """What a number is of."""

    layer: int
    head: int
    statistic: str
    x: float
    y: int = 0


class RunningMoments:
    """Count, mean and sum of squared deviations of a stream of numbers, taken a batch at a time (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, n: int, mean: float, squares: float = 0.0) -> None:
        """Take ``n`` more numbers, of which mean and squared deviations from it are given."""
        total, between = self.n + n, mean - self.mean
        self.squares += squares + between**2 * self.n * n / total
        self.mean += between * n / total
        self.n = total

    @property
    def std(self) -> float:
        """Standard deviation with n - 1; 0 for a single number."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else 0.0


class Pairs(NamedTuple):
    """What a memory was given, ``[N, T, H, *]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    state: MemoryState | None
    read_last: bool = False
    """Queries are read after the last write, as in the retrieval task, not each after its step."""
    written: Tensor | None = None
    """``[N, T]``, false at padding."""

    def slice(self, first: int, last: int) -> Pairs:
        """The steps from ``first`` to before ``last``."""
        gates = tuple(x[:, first:last] for x in self.gates)
        written = None if self.written is None else self.written[:, first:last]
        return self._replace(k=self.k[:, first:last], v=self.v[:, first:last], gates=gates, written=written)

    def write(self, memory: FastWeightMemory, state: MemoryState | None) -> MemoryState:
        """The state after all pairs are written."""
        return memory.write(self.k, self.v, self.gates, state, written=self.written)


class MemoryProbe(L.Callback):
    """Records what memories do in a validation: means in the metrics, and the whole in the run's ``probes.csv``.

    Per layer and head, over the sequences looked at (x):
    ``before_cosine``, ``before_norm``, ``after_cosine``, ``after_norm``: of what the key of a pair retrieves as a query
    before and after the pair is written, against the value written; the norm as a ratio (step);
    ``remove_to_write``: total remove weight over write weight of the delta rule, App. A.2; 1 is a balanced write;
    ``self_gain``: phi(k) . phi(k), the share of a write that the same key gets back;
    ``z_phi_q``, ``W_norm``: the read-out's denominator and the memory's Frobenius norm (step), and with the prefix
    ``carried_`` at the end of batches 1, 2, 4, 8, .. (steps since the memory was empty);
    ``singular_value`` (index), ``effective_rank`` (exp of the entropy of the normalised spectrum, Roy and Vetterli
    2007), ``d_dot``: of the memory after a segment;
    ``beta``, ``beta_share`` (lower end of a bin of 0.1): the write strength;
    ``weight`` (lag): the effective attention weight that a read-out gives to the value of so many steps ago, and
    ``negative_share``, that of the negative ones in all of them; ``map`` (query, position y): the weights of the first
    sequence, ``newest``: 1 at the position that holds the answer, and ``weight_of_newest``, what that one gets.
    """

    def __init__(self, every: int | None = None, batches: int = 2, sequences: int = 1, map_size: int = 0) -> None:
        """Check the numbers.

        Args:
            every: validations from one look to the next, the first one included; null: every one of a text, and of
                retrieval each 50th and the last one, so that a look costs less than 5 % of the steps between two.
            batches: of a validation, the first ones, that are looked at whole; of later ones only norms.
            sequences: of a batch, the first ones, that are looked at.
            map_size: positions of the map of attention weights, the first ones of a text; of retrieval, the longest
                sequence that is mapped; 0 keeps none.
        """
        for name, value in [("every", every), ("batches", batches), ("sequences", sequences)]:
            if name == "every" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"MemoryProbe: {name}={value} must be a whole number >= 1")
        if type(map_size) is not int or map_size < 0:
            raise ValueError(f"MemoryProbe: map_size={map_size} must be a whole number >= 0")
        self.every, self.batches, self.sequences, self.map_size = every, batches, sequences, map_size
        self.moments: dict[Place, RunningMoments] = {}
        self.step = 0
        self._batch = 0
        self._passed: dict[int, int] = {}
        self._z: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    # --- Lightning's side

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a look, if this validation has one: hooks are there for its length only."""
        if trainer.sanity_checking:
            return
        done = _validations(trainer)
        # of retrieval the end of the validation says whether it is the last one, and a look is taken there
        if not _is_retrieval(pl_module) and done % (self.every or 1):
            return
        memories = _memories(pl_module)
        if not memories and done == 0:
            log.warning("MemoryProbe finds no fast weight memory in %s and records nothing", type(pl_module).__name__)
        if not memories or _is_retrieval(pl_module):
            return
        if getattr(pl_module, "compute", "") == "compiled":
            raise ValueError("MemoryProbe looks between the layers, which model.compute=compiled merges; set eager")
        self._begin(trainer, pl_module)
        self._hooks = [
            memory.register_forward_hook(self._hook_of(layer), with_kwargs=True)
            for layer, memory in enumerate(memories)
        ]

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep count."""
        self._batch = batch_idx

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the few means, and take the hooks away."""
        if _is_retrieval(pl_module):
            if trainer.sanity_checking or not self._looks_at_retrieval(trainer) or not _memories(pl_module):
                return
            self._begin(trainer, pl_module)
            # the same sequences at every validation, and for every model of this seed
            batch = trainer.datamodule.evaluation(0)  # type: ignore[attr-defined]
            self._batch = 0
            self.look_at_retrieval(pl_module.model, *(x[: self.sequences] for x in batch))  # type: ignore[arg-type]
        elif not self._hooks:
            return
        self._remove_hooks()
        for name, value in self.tracked().items():
            pl_module.log(f"probe/{name}", value, on_step=False, on_epoch=True, batch_size=1)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the look before."""
        self.moments, self._z, self._passed = {}, {}, {}
        self.step = int(getattr(pl_module, "steps", trainer.global_step))

    def _looks_at_retrieval(self, trainer: L.Trainer) -> bool:
        done = _validations(trainer)
        if self.every is not None:
            return done % self.every == 0
        # the task has said by now whether it stops; a validation by itself is its own last one
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        return ends or trainer.state.fn != TrainerFn.FITTING or (done + 1) % EVERY_OF_RETRIEVAL == 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook_of(self, layer: int) -> Any:
        def hook(memory: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], returned: Any) -> None:
            assert isinstance(memory, FastWeightMemory)
            bound = inspect.signature(memory.forward).bind(*given, **named).arguments
            with torch.no_grad():
                self.look(layer, memory, self._pairs(bound))

        return hook

    def _pairs(self, given: Mapping[str, Any]) -> Pairs:
        n = self.sequences
        q, k, v = (given[name][:n].detach() for name in QKV)
        gates, written = given.get("gates"), given.get("written")
        gates = () if gates is None else (gates,) if isinstance(gates, Tensor) else gates
        return Pairs(
            *(q, k, v, tuple(x[:n].detach() for x in gates), _first(given.get("state"), n)),
            written=None if written is None else written[:n],
        )

    # --- what is left

    def tracked(self) -> dict[str, float]:
        """Return the means over layers and heads of the statistics that a run's metrics have, at their last x."""
        found = {}
        for name in TRACKED:
            there = [(place.x, moments.mean) for place, moments in self.moments.items() if place.statistic == name]
            last = max((x for x, _ in there), default=0.0)
            values = [value for x, value in there if x == last]
            if values:
                found[name] = sum(values) / len(values)
        return found

    def texts(self) -> dict[str, str]:
        """Return the table of the last look, to be kept with the run."""
        if not self.moments:
            return {}
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        for place, moments in sorted(self.moments.items()):
            numbers = (f"{place.x:g}", place.y, f"{moments.mean:.6g}", f"{moments.std:.4g}", moments.n)
            writer.writerow((self.step, place.layer, place.head, place.statistic, *numbers))
        return {TABLE: buffer.getvalue()}

    # --- looking

    @torch.no_grad()
    def look_at_retrieval(
        self, model: RetrievalModel, keys: Tensor, values: Tensor, queries: Tensor, targets: Tensor, mask: Tensor
    ) -> None:
        """Look at the memory of a retrieval model, which is written whole and then queried."""
        memory = model.memory
        if memory.config.feature_map == "favor" and memory.config.favor.stabilizer == "sequence":
            log.warning("MemoryProbe writes pair by pair, which favor.stabilizer=sequence does not allow")
            return
        q, k, v, gates = model.project(keys, values, queries)
        pairs = Pairs(q, k, v, gates, None, read_last=True)
        self.look(0, memory, pairs)
        if not memory.has_attention_weights:
            return
        weights, newest = memory.attention_weights(q, k, gates), _newest(keys, queries).where(mask, -1)
        self._add_negative_share(0, weights)
        asked = newest[0] >= 0
        right = weights[0][:, asked].gather(-1, newest[0][asked].expand(weights.shape[1], -1).unsqueeze(-1))
        self._add(0, "weight_of_newest", 0, right.squeeze(-1).T.unsqueeze(0))
        if weights.shape[-1] <= self.map_size and self._batch == 0:
            self._add_map_of_queries(weights[0, 0], newest[0])

    def look(self, layer: int, memory: FastWeightMemory, pairs: Pairs) -> None:
        """Add what one call of a memory shows."""
        passed = self._passed.get(layer, 0) if pairs.state is not None else 0
        z = self._sums_of_keys(layer, memory, pairs)
        q = memory.query_features(pairs.q)
        self._passed[layer] = passed + pairs.k.shape[1]
        if self._batch < self.batches:
            after = self._write_and_look(layer, memory, pairs, q, z)
            self._look_at_writes(layer, memory, pairs, z)
            if memory.has_attention_weights and not pairs.read_last:
                self._look_at_weights(layer, memory, pairs)
        elif pairs.state is None or not _is_power_of_two(self._batch + 1):
            # a carried memory is looked at again whenever it has seen twice as much
            return
        else:
            after = pairs.write(memory, pairs.state)
        if not _has_matrix(memory):
            return
        if self._batch < self.batches:
            self._look_at_spectrum(layer, after.memory[0])
        self._add(layer, "carried_z_phi_q", self._passed[layer], _denominators(z, q, -1, pairs))
        self._add(layer, "carried_W_norm", self._passed[layer], _norm(after.memory[0]))

    def _write_and_look(self, layer: int, memory: FastWeightMemory, pairs: Pairs, q: Tensor, z: Tensor) -> MemoryState:
        """Write all pairs; at some of them compare what the key retrieves, before and after, with the value."""
        state, done = pairs.state, 0
        seen: dict[str, list[Tensor]] = {}
        positions = _positions(pairs.k.shape[1])
        for step in positions:
            if step - 1 > done:
                state = pairs.slice(done, step - 1).write(memory, state)
            pair = pairs.slice(step - 1, step)
            before = _contrast(_retrieved(memory, pair.k, state), pair.v)
            state, done = pair.write(memory, state), step
            after = _contrast(_retrieved(memory, pair.k, state), pair.v)
            numbers = {f"before_{name}": x for name, x in before.items()} | {f"after_{n}": x for n, x in after.items()}
            numbers["z_phi_q"] = _denominators(z, q, step - 1, pairs)
            if _has_matrix(memory):
                numbers["W_norm"] = _norm(state.memory[0])
            for name, x in numbers.items():
                seen.setdefault(name, []).append(x)
        for name, values in seen.items():
            self._add_each(layer, name, positions, torch.stack(values))
        assert state is not None
        return state

    def _look_at_writes(self, layer: int, memory: FastWeightMemory, pairs: Pairs, z: Tensor) -> None:
        """Balance of a write (App. A.2), what its key gets back, and beta.

        Feature i of a key adds ``k_i`` of the new value and takes ``sum_j k_i k_j / d`` of what was there away, with
        d = 1, or z_{t-1} . k_t where the retrieval is normalised (eq. 27).
        """
        k = memory.key_features(pairs.k)
        self._add(layer, "self_gain", 0, k.square().sum(-1))
        betas = [x for gate, x in zip(memory.rule.gates, pairs.gates, strict=False) if gate.name == "beta"]
        if not betas:
            return
        removed = k.sum(-1)
        if memory.config.attention_norm == "both":
            removed = removed / (((z - k) * k).sum(-1) + memory.config.attention_norm_eps)
        # the first write of an empty memory takes nothing away
        self._add(layer, "remove_to_write", 0, removed[:, 1:] if pairs.state is None else removed)
        self._add(layer, "beta", 0, betas[0])
        bins = (betas[0] * BETA_BINS).long().clamp(0, BETA_BINS - 1)
        numbers = torch.arange(BETA_BINS, device=bins.device).view(-1, *[1] * bins.dim())
        self._add_each(layer, "beta_share", [n / BETA_BINS for n in range(BETA_BINS)], (bins == numbers).double())

    def _sums_of_keys(self, layer: int, memory: FastWeightMemory, pairs: Pairs) -> Tensor:
        """Return z ``[N, T, H, K]`` after each write, kept by the layer or not; carried where the state is."""
        z = memory.key_features(pairs.k).cumsum(1)
        if pairs.state is not None and layer in self._z:
            z = z + self._z[layer].unsqueeze(1)
        self._z[layer] = z[:, -1]
        return z

    def _look_at_spectrum(self, layer: int, W: Tensor) -> None:
        values = torch.linalg.svdvals(W.float())
        self._add(layer, "effective_rank", 0, effective_rank(values).unsqueeze(1))
        self._add(layer, "d_dot", 0, torch.full((1, 1, W.shape[1]), float(W.shape[2])))
        self._add_each(layer, "singular_value", range(values.shape[-1]), values.movedim(-1, 0).unsqueeze(2))

    def _look_at_weights(self, layer: int, memory: FastWeightMemory, pairs: Pairs) -> None:
        """The weights in ``o_n = sum_t a_{n,t} v_t``: what a memory that starts empty answers where v_t is a unit."""
        n, length, heads = pairs.k.shape[:3]
        units = torch.eye(length, dtype=pairs.v.dtype, device=pairs.v.device)[None, :, None].expand(n, -1, heads, -1)
        # not through __call__, which would look again
        weights = memory.forward(pairs.q, pairs.k, units, pairs.gates, written=pairs.written)[0].transpose(1, 2)
        self._add_negative_share(layer, weights)
        for lag in range(length):
            if lag + 1 in _positions(length):
                self._add(layer, "weight", lag, weights.diagonal(-lag, dim1=-2, dim2=-1).transpose(1, 2))
        if self.map_size and self._batch == 0:
            for head in range(heads):
                for query, row in enumerate(weights[0, head, : self.map_size, : self.map_size]):
                    self._add_row(Place(layer, head, "map", query), row)

    def _add_negative_share(self, layer: int, weights: Tensor) -> None:
        negative, all_ = (-weights).clamp(min=0).sum((-2, -1)), weights.abs().sum((-2, -1))
        self._add(layer, "negative_share", 0, (negative / all_.clamp(min=1e-12)).unsqueeze(1))

    def _add_map_of_queries(self, weights: Tensor, newest: Tensor) -> None:
        """The map ``[Q, T]`` of one sequence, queries in the order in which their keys were last written."""
        known = [query for query in newest.argsort().tolist() if newest[query] >= 0]
        for number, query in enumerate(known):
            self._add_row(Place(0, 0, "map", number), weights[query])
            self._moments_of(Place(0, 0, "newest", number, int(newest[query]))).add(1, 1.0)

    def _add_row(self, place: Place, row: Tensor) -> None:
        for y, value in enumerate(row.tolist()):
            self._moments_of(place._replace(y=y)).add(1, value)

    def _add(self, layer: int, statistic: str, x: float, values: Tensor) -> None:
        """Add numbers ``[N, *, H]`` of every head."""
        self._add_each(layer, statistic, [x], values.unsqueeze(0))

    def _add_each(self, layer: int, statistic: str, xs: Sequence[float], values: Tensor) -> None:
        """Add numbers ``[X, N, *, H]`` of every head at X places: a few calls of torch, however many there are."""
        by_head = values.double().flatten(1, -2)
        n = by_head.shape[1]
        if n == 0:
            return
        means = by_head.mean(1)
        squares = (by_head - means.unsqueeze(1)).square().sum(1)
        for x, of_mean, of_square in zip(xs, means.tolist(), squares.tolist(), strict=True):
            for head, (mean, square) in enumerate(zip(of_mean, of_square, strict=True)):
                self._moments_of(Place(layer, head, statistic, float(x))).add(n, mean, square)

    def _moments_of(self, place: Place) -> RunningMoments:
        return self.moments.setdefault(place, RunningMoments())


def effective_rank(singular_values: Tensor) -> Tensor:
    """Return exp of the entropy of singular values ``[..., R]`` normalised to sum to 1 (Roy and Vetterli 2007).

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0])).item()
    2.0
    """
    p = singular_values / singular_values.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.exp(torch.special.entr(p).sum(-1))


def _validations(trainer: L.Trainer) -> int:
    """Return how many validations there were before this one, as a run that was stopped and resumed counts them too."""
    return max(0, (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1) - 1)


def _memories(module: nn.Module) -> list[FastWeightMemory]:
    """The memories that write a pair a step, and can write before they read."""
    memories = [part for part in module.modules() if isinstance(part, FastWeightMemory)]
    return [x for x in memories if x.rule.pairs == 1 and not x.rule.reads_while_writing]


def _is_retrieval(module: nn.Module) -> bool:
    return isinstance(getattr(module, "model", None), RetrievalModel)


def _first(state: MemoryState | None, n: int) -> Any:
    if state is None:
        return None
    return MemoryState(tuple(x[:n].detach() for x in state.memory), None if state.z is None else state.z[:n].detach())


def _positions(length: int) -> list[int]:
    """Steps from 1 to ``length``, evenly spaced on a log scale."""
    spaced = {round(length ** (n / (N_POSITIONS - 1))) for n in range(N_POSITIONS)}
    return sorted(spaced | {1, length})


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _has_matrix(memory: FastWeightMemory) -> bool:
    """Whether the state is a matrix W of fixed size, which softmax's is not."""
    return memory.state_size(1) is not None


def _contrast(found: Tensor | None, v: Tensor) -> dict[str, Tensor]:
    """Cosine and ratio of norms ``[N, 1, H]`` of what was retrieved, nothing from no memory, against the value."""
    found = torch.zeros_like(v) if found is None else found
    cosine = cosine_similarity(found.float(), v.float(), dim=-1)
    return {"cosine": cosine, "norm": found.norm(dim=-1) / v.norm(dim=-1).clamp(min=1e-12)}


def _norm(W: Tensor) -> Tensor:
    return W.float().flatten(2).norm(dim=-1).unsqueeze(1)


def _denominators(z: Tensor, q: Tensor, step: int, pairs: Pairs) -> Tensor:
    """``z . phi(q)`` ``[N, *, H]`` after a step: of its query, or of all where they are read last."""
    now = z[:, step].unsqueeze(1)
    return (now * (q if pairs.read_last else q[:, step].unsqueeze(1))).sum(-1)


def _newest(keys: Tensor, queries: Tensor) -> Tensor:
    """Where each queried key was last written ``[N, Q]``; -1 where it was not."""
    positions = torch.arange(keys.shape[1], device=keys.device).expand(*queries.shape, -1)
    return positions.where(keys.unsqueeze(1) == queries.unsqueeze(-1), -1).amax(-1)


def _retrieved(memory: FastWeightMemory, k: Tensor, state: MemoryState | None) -> Tensor | None:
    """What a key retrieves as a query, without the scale of the output."""
    if state is None:
        return None
    found = memory.read(k, state)
    return found * memory.d_key**0.5 if memory.config.output_scale == "rsqrt_d" else found
