"""Training a memory of key-value pairs that is read once a sequence: loss, gradients and Adam, compiled.

``csrc/pair_training.cpp`` does many optimiser steps in one call, without building keys or features for the batch.
``models.retrieval`` has the same function in PyTorch; ``README.md`` beside this file derives the recurrences.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fwp_lightning import compiled

KERNEL = "pair_training"
RULES = {"sum": 0, "delta": 1, "fwm": 2, "softmax": 3}
FEATURE_MAPS = {"elu": 0, "dpfp": 1, "tanh": 2, "identity": 3, "favor": 4}
STABILIZERS = {"none": 0, "sequence": 1, "vector": 2}
_DTYPES = {torch.float32, torch.float64}
_NORMALISATIONS = {
    ("sum", "none", "none"),
    ("sum", "none", "readout"),
    # only these: the backward pass winds the adjoint recurrence up again, which is stable for sum-normalised keys alone
    ("delta", "sum", "none"),
    ("fwm", "none", "none"),
    ("softmax", "none", "none"),
}


@dataclass(frozen=True)
class PairMemory:
    """What is computed: the axes of an attention as far as this kernel has them."""

    rule: str
    feature_map: str
    phi_norm: str = "none"
    attention_norm: str = "none"
    output_scale: str = "none"
    nu: int = 1
    key_norm_eps: float = 0.0
    query_norm_eps: float = 0.0
    attention_norm_eps: float = 1e-6
    stabilizer: str = "none"
    """FAVOR+: the largest exponent is subtracted, of a sequence's keys or of each vector."""
    input_scale: float = 1.0
    """FAVOR+: keys and queries are multiplied by this before the map."""
    kernel_eps: float = 0.0
    """FAVOR+: added to every exponential."""
    layer_norm: bool = False
    """A LayerNorm without parameters on what is read."""

    @functools.cache  # noqa: B019 - asked at every block; there are as many entries as configurations
    def why_not(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the sentence why the kernel cannot compute this, or None if it can (it is built if need be)."""
        normalisation = (self.rule, self.phi_norm, self.attention_norm)
        checks: list[tuple[str, object, Collection[object]]] = [
            ("rule", self.rule, RULES),
            ("feature_map", self.feature_map, FEATURE_MAPS),
            ("dtype", dtype, _DTYPES),
            ("device", device.type, {"cpu"}),
            ("output_scale", self.output_scale, {"none"}),
            ("favor.kernel_eps", self.kernel_eps, {0.0}),
            ("(rule, phi_norm, attention_norm)", normalisation, _NORMALISATIONS),
        ]
        for name, value, known in checks:
            if value not in known:
                return f"the compiled training has no {name} {value}; it has {', '.join(str(x) for x in known)}"
        return compiled.why_unavailable(KERNEL)


class PairParameters(NamedTuple):
    """Tensors of the projections: parameters, their gradients or an optimiser's moments of them.

    The key of the pair ``(i, j)`` is ``W_k [onehot(j), embedding[i]] + b_k``, the query of the key ``i`` is
    ``W_q embedding[i] + b_q``, the write strength ``sigmoid(W_beta [onehot(j), embedding[i]] + b_beta)``.
    """

    embedding: Tensor
    """``[S, e]``"""
    W_k: Tensor
    """``[D, S + e]``"""
    b_k: Tensor
    W_q: Tensor
    """``[D, e]``"""
    b_q: Tensor
    W_beta: Tensor | None = None
    """``[1, S + e]``, for rules with a write strength"""
    b_beta: Tensor | None = None


class PairBatches(NamedTuple):
    """Sequences of N optimiser steps, ids from 0 to S - 1."""

    keys: Tensor
    """``[N, B, T]``"""
    values: Tensor
    """``[N, B, T]``"""
    queries: Tensor
    """``[N, B, 1]``"""
    targets: Tensor
    """``[N, B, 1]``"""


class AdamState(NamedTuple):
    """Adam's numbers and moments; the moments are changed in place as the parameters are."""

    means: PairParameters
    squares: PairParameters
    steps: int
    """Steps done before."""
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def pair_gradients(
    memory: PairMemory, parameters: PairParameters, batches: PairBatches, directions: Tensor | None = None
) -> tuple[Tensor, PairParameters]:
    """Return the loss ``[1]`` of one batch, the mean of ``0.5 |y - onehot(target)|^2``, and its gradients.

    Takes batches of N = 1. ``directions`` ``[1, m, D]`` is FAVOR+'s matrix. Raises ``ValueError`` with the reason if it
    cannot run.
    """
    gradients = _empty_like(parameters)
    losses = _run(memory, parameters, batches, directions, gradients, None)
    return losses, gradients


def train_pairs(
    memory: PairMemory,
    parameters: PairParameters,
    adam: AdamState,
    batches: PairBatches,
    directions: Tensor | None = None,
) -> Tensor:
    """Take one step of Adam per batch, in place, and return the losses before each, ``[N]``.

    ``directions`` ``[N, m, D]`` has FAVOR+'s matrix of each step, ``[1, m, D]`` one for all. Raises ``ValueError`` with
    the reason if it cannot run.
    """
    return _run(memory, parameters, batches, directions, _empty_like(parameters), adam)


def _empty_like(parameters: PairParameters) -> PairParameters:
    return PairParameters(*(None if x is None else torch.empty_like(x) for x in parameters))  # type: ignore[arg-type]


_Pointers = ctypes.c_void_p * len(PairParameters._fields)


class _Problem(ctypes.Structure):
    """``Problem<Real>`` of the C++ source."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("batch", "pairs", "n_keys", "n_embedding", "size", "rule", "map", "nu")]
        + [(name, ctypes.c_int64) for name in ("n_directions", "stabilizer", "normalise_readout", "layer_norm")]
        + [(name, ctypes.c_double) for name in ("key_eps", "query_eps", "readout_eps", "input_scale")]
        + [(name, ctypes.c_int64) for name in ("n_steps", "steps_done")]
        + [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "adam_eps")]
        + [(name, ctypes.c_void_p) for name in ("keys", "values", "queries", "targets", "directions")]
        + [("directions_per_step", ctypes.c_int64), ("losses", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]
        + [(name, _Pointers) for name in ("parameters", "gradients", "means", "squares")]
    )


def _run(
    memory: PairMemory,
    parameters: PairParameters,
    batches: PairBatches,
    directions: Tensor | None,
    gradients: PairParameters,
    adam: AdamState | None,
) -> Tensor:
    like = parameters.embedding
    reason = memory.why_not(like.dtype, like.device)
    if reason:
        raise ValueError(reason)
    batches = PairBatches(*(x.contiguous() for x in batches))
    directions = None if directions is None else directions.to(like.dtype).contiguous()
    _check(memory, parameters, batches, directions)
    losses = like.new_empty(batches.keys.shape[0])
    problem = _problem(memory, parameters, batches, directions, losses)
    if compiled.count(KERNEL, "stray_ids", like.dtype, problem):
        _refuse_stray_ids(batches, like.shape[0])
    problem.gradients = _pointers(gradients)
    if adam is not None:
        problem.steps_done, problem.lr, problem.adam_eps = adam.steps, adam.lr, adam.eps
        problem.beta1, problem.beta2 = adam.betas
        problem.means, problem.squares = _pointers(adam.means), _pointers(adam.squares)
    scratch = like.new_empty(compiled.count(KERNEL, "scratch", like.dtype, problem))
    problem.scratch = scratch.data_ptr()
    compiled.call(KERNEL, "gradients" if adam is None else "steps", like.dtype, problem)
    return losses


def _problem(
    memory: PairMemory, parameters: PairParameters, batches: PairBatches, directions: Tensor | None, losses: Tensor
) -> _Problem:
    n_steps, batch, pairs = batches.keys.shape
    n_keys, n_embedding = parameters.embedding.shape
    return _Problem(
        batch=batch,
        pairs=pairs,
        n_keys=n_keys,
        n_embedding=n_embedding,
        size=parameters.W_k.shape[0],
        rule=RULES[memory.rule],
        map=FEATURE_MAPS[memory.feature_map],
        nu=memory.nu,
        n_directions=0 if directions is None else directions.shape[1],
        stabilizer=STABILIZERS[memory.stabilizer],
        normalise_readout=memory.attention_norm == "readout",
        layer_norm=memory.layer_norm,
        key_eps=memory.key_norm_eps,
        query_eps=memory.query_norm_eps,
        readout_eps=memory.attention_norm_eps,
        input_scale=memory.input_scale,
        n_steps=n_steps,
        keys=batches.keys.data_ptr(),
        values=batches.values.data_ptr(),
        queries=batches.queries.data_ptr(),
        targets=batches.targets.data_ptr(),
        directions=None if directions is None else directions.data_ptr(),
        directions_per_step=directions is not None and directions.shape[0] > 1,
        losses=losses.data_ptr(),
        parameters=_pointers(parameters),
    )


def _check(memory: PairMemory, parameters: PairParameters, batches: PairBatches, directions: Tensor | None) -> None:
    """Raise ``ValueError`` for what would make the kernel read or write outside of a tensor."""
    n_steps, batch, pairs = batches.keys.shape
    n_keys, n_embedding = parameters.embedding.shape
    size, has_beta = parameters.W_k.shape[0], memory.rule in ("delta", "fwm")
    # The kernel divides by these sizes. There may be no step, and sequences without pairs.
    needed = {"embedding": parameters.embedding.shape, "W_k": parameters.W_k.shape}
    needed["queries"] = batches.queries.shape[1:]
    if directions is not None:
        needed["directions"] = directions.shape[1:]
    for name, sizes in needed.items():
        if 0 in sizes:
            raise ValueError(f"{name} has the sizes {tuple(sizes)}; the compiled training needs at least 1 of each")
    shapes: dict[str, tuple[int, ...]] = {
        "W_k": (size, n_keys + n_embedding), "b_k": (size,), "W_q": (size, n_embedding), "b_q": (size,),
        "W_beta": (1, n_keys + n_embedding), "b_beta": (1,),
        "values": (n_steps, batch, pairs), "queries": (n_steps, batch, 1), "targets": (n_steps, batch, 1),
    }  # fmt: skip
    given = parameters._asdict() | batches._asdict()
    for name, shape in shapes.items():
        if name.endswith("_beta") and not has_beta:
            continue
        if given[name] is None or tuple(given[name].shape) != shape:
            said = None if given[name] is None else tuple(given[name].shape)
            raise ValueError(f"{name} has shape {said}; embedding and keys ask for {shape}")
    for name, tensor in parameters._asdict().items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous, and it is changed in place; give a contiguous tensor")
    if memory.feature_map == "favor" and (
        directions is None or directions.shape[0] not in (1, n_steps) or directions.shape[2] != size
    ):
        said = None if directions is None else tuple(directions.shape)
        raise ValueError(f"directions has shape {said}; expected [1 or {n_steps}, m, {size}]")
    for name, ids in batches._asdict().items():
        if ids.dtype != torch.int64:
            raise ValueError(f"{name} is {ids.dtype}; ids are int64")


def _refuse_stray_ids(batches: PairBatches, n_keys: int) -> None:
    """Raise ``ValueError`` that names the ids that are no key's or value's."""
    for name, ids in batches._asdict().items():
        stray = ids[(ids < 0) | (ids >= n_keys)]
        if stray.numel():
            raise ValueError(f"{name} has the id {int(stray[0])}, which is outside 0 .. {n_keys - 1}")


def _pointers(tensors: PairParameters) -> Any:
    return _Pointers(*(None if x is None else x.data_ptr() for x in tensors))
