"""Who computes a rule: the backends, what each can run, and how ``auto`` chooses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from fwp_lightning.ops import chunked, fwm, reference
from fwp_lightning.registry import Registry

log = logging.getLogger(__name__)

Implementation = Callable[..., tuple[torch.Tensor | None, torch.Tensor]]

BACKENDS: Registry[dict[str, Implementation]] = Registry("backend")
# fastest first: `auto` takes the first that computes the rule
BACKENDS.register("chunked")({"sum": chunked.sum_rule, "delta": chunked.delta_rule})
BACKENDS.register("scan")({"fwm": fwm.fwm_rule})
BACKENDS.register("reference")({"sum": reference.sum_rule, "delta": reference.delta_rule, "fwm": reference.fwm_rule})


def why_not(backend: str, rule: str) -> str | None:
    """Return the sentence why ``backend`` cannot run ``rule``, or None if it can."""
    if rule in BACKENDS[backend]:
        return None
    choices = ", ".join(["auto", *backends_of(rule)])
    return f"backend {backend!r} does not compute the rule {rule!r}; choose one of {choices}"


def backends_of(rule: str) -> list[str]:
    """Return the backends that compute ``rule``, fastest first."""
    return [name for name in BACKENDS if rule in BACKENDS[name]]


def implementation(rule: str, backend: str, steps: int) -> Implementation:
    """Return the function that computes ``rule``; a backend asked for by name is used or refused, never swapped."""
    if backend != "auto":
        reason = why_not(backend, rule)
        if reason:
            raise ValueError(reason)
        return BACKENDS[backend][rule]
    # one step is one write and one read: there is nothing to make parallel
    chosen = "reference" if steps == 1 else backends_of(rule)[0]
    if steps > 1:
        _log_choice(rule, chosen)
    return BACKENDS[chosen][rule]


@functools.cache
def _log_choice(rule: str, backend: str) -> None:
    log.info("rule %s: backend %s", rule, backend)


def check(*, causal: bool = True, **tensors: Any) -> None:
    """Raise ``ValueError`` naming the argument that does not fit ``k`` in shape, dtype or device.

    Expects ``q k v beta state`` as in the ops; absent ones are None. Without causality ``q`` may have any length.
    """
    k, v = tensors["k"], tensors["v"]
    for name in ("k", "v"):
        if tensors[name].dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected 4 dimensions [B, T, H, D]")
    b, t, h, n_features = k.shape
    q = tensors.get("q")
    n_queries = t if causal or q is None or q.dim() != 4 else q.shape[1]
    expected = {"q": (b, n_queries, h, n_features), "v": (b, t, h, v.shape[-1]), "beta": (b, t, h)}
    expected["state"] = (b, h, n_features, v.shape[-1])
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; k {tuple(k.shape)} asks for {shape}")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} but k is on {k.device}; move them to one device")
        if tensor.dtype != k.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but k is {k.dtype}; give all inputs one dtype")
    if not k.is_floating_point():
        raise ValueError(f"k is {k.dtype}; the rules need a floating-point dtype")
