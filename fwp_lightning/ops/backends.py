"""Who computes a rule: the backends, what each can run, and how ``auto`` chooses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwp_lightning.ops import chunked, cuda_recurrence, fwm, fwm_recurrence, recurrence, reference
from fwp_lightning.registry import Registry

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# the last state is a tensor, or a tuple of them
Implementation = Callable[..., tuple[Tensor | None, Any]]


@dataclass(frozen=True)
class Backend:
    """The rules that a backend computes, and the reason why it cannot take certain tensors for a rule."""

    rules: dict[str, Implementation]
    why_not: Callable[[str, Tensor], str | None] = lambda rule, k: None
    kernels: tuple[str, ...] = ()
    """The compiled kernels it needs."""
    takes_half: tuple[torch.dtype, ...] = ()
    """The half-precision dtypes that it reads itself; others get float32. States are float32 either way."""
    most_values: int | None = None
    """The largest V it takes."""


def _compiled_why_not(rule: str, k: Tensor) -> str | None:
    return (fwm_recurrence if rule == "fwm" else recurrence).why_not(k)


BACKENDS: Registry[Backend] = Registry("backend")
# rules, and their backends, that `implements` gave
_WIDENED: set[tuple[str, str]] = set()
# fastest first: `auto` takes the first that can
BACKENDS.register("cuda")(
    Backend(
        {"sum": cuda_recurrence.sum_rule, "delta": cuda_recurrence.delta_rule},
        lambda rule, k: cuda_recurrence.why_not(k),
        kernels=("recurrence.cu",),
        takes_half=(torch.bfloat16,),
        most_values=cuda_recurrence.MOST_VALUES,
    )
)
BACKENDS.register("cpu")(
    Backend(
        {"sum": recurrence.sum_rule, "delta": recurrence.delta_rule, "fwm": fwm_recurrence.fwm_rule},
        _compiled_why_not,
        kernels=("recurrence", "fwm"),
    )
)
BACKENDS.register("chunked")(
    Backend({"sum": chunked.sum_rule, "delta": chunked.delta_rule}, takes_half=(torch.bfloat16, torch.float16))
)
BACKENDS.register("scan")(Backend({"fwm": fwm.fwm_rule}))
BACKENDS.register("reference")(
    Backend({"sum": reference.sum_rule, "delta": reference.delta_rule, "fwm": reference.fwm_rule})
)


def implements(rule: str, backend: str) -> Callable[[Implementation], Implementation]:
    """Return a decorator that lets a backend compute a rule with the function, in the rule's own file.

    It is called with ``q k v``, the rule's gates and the state, None for an empty memory, none in half precision. It
    returns outputs and the last state; a state is one tensor, or a tuple where the rule has several.
    """

    def store(function: Implementation) -> Implementation:
        known = BACKENDS[backend].rules.get(rule)
        if known is not None and known.__code__.co_filename != function.__code__.co_filename:
            raise ValueError(f"backend {backend!r} computes the rule {rule!r} already; choose another name")
        BACKENDS[backend].rules[rule] = function
        _WIDENED.add((rule, backend))
        return function

    return store


def why_not(backend: str, rule: str, k: Tensor | None = None, v: Tensor | None = None) -> str | None:
    """Return the sentence why ``backend`` cannot run ``rule`` (on tensors like ``k`` and ``v``), or None if it can."""
    chosen = BACKENDS[backend]
    if rule not in chosen.rules:
        choices = ", ".join(["auto", *backends_of(rule)])
        return f"backend {backend!r} does not compute the rule {rule!r}; choose one of {choices}"
    reason = None if k is None else chosen.why_not(rule, k)
    if reason is None and v is not None and chosen.most_values is not None and v.shape[-1] > chosen.most_values:
        return f"V={v.shape[-1]} is over the {chosen.most_values} of backend {backend!r}; choose chunked"
    return reason


def backends_of(rule: str, k: Tensor | None = None, v: Tensor | None = None) -> list[str]:
    """Return the backends that compute ``rule`` (on tensors like ``k`` and ``v``), fastest first."""
    return [name for name in BACKENDS if rule in BACKENDS[name].rules and not why_not(name, rule, k, v)]


def implementation(rule: str, backend: str, k: Tensor, v: Tensor) -> Implementation:
    """Return the function that computes ``rule``; a backend asked for by name is used or refused, never swapped."""
    if backend != "auto":
        reason = why_not(backend, rule, k, v)
        if reason:
            # what a build lacks does not name the argument
            raise ValueError(reason if f"'{backend}'" in reason else f"backend {backend!r} cannot run here: {reason}")
        return _for_dtype(rule, backend, k.dtype)
    # one step is one write and one read: there is nothing to make parallel
    chosen = "reference" if k.shape[1] == 1 else backends_of(rule, k, v)[0]
    # a tracer would have to stop for a message
    if k.shape[1] > 1 and not torch.compiler.is_compiling():
        _log_choice(rule, chosen)
    return _for_dtype(rule, chosen, k.dtype)


def _for_dtype(rule: str, name: str, dtype: torch.dtype) -> Implementation:
    """Return the backend's function; for half precision, one that computes and carries states in float32."""
    backend = BACKENDS[name]
    function, wide = backend.rules[rule], reference.state_dtype(dtype)
    if dtype == wide:
        return function
    reads_half = dtype in backend.takes_half and (rule, name) not in _WIDENED

    def computed_in_float32(*inputs: Any, **options: Any) -> tuple[Tensor | None, Any]:
        *tensors, state = inputs
        if not reads_half:
            tensors = [None if x is None else x.to(wide) for x in tensors]
        if state is not None:
            state = tuple(x.to(wide) for x in state) if isinstance(state, tuple) else state.to(wide)
        o, last = function(*tensors, state, **options)
        return (None if o is None else o.to(dtype)), last

    return computed_in_float32


@functools.cache
def _log_choice(rule: str, backend: str) -> None:
    log.info("rule %s: backend %s", rule, backend)


def check(
    *, needs: tuple[str, ...] = ("k", "v"), causal: bool = True, n_features: int | None = None, **tensors: Any
) -> None:
    """Raise ``ValueError`` naming the argument that is no tensor or does not fit ``k`` in shape, dtype or device.

    Expects ``q k v beta state z`` as in the ops; those that are not needed may be None or absent; others are gates
    ``[B, T, H]``. Without causality ``q`` may have any length. A state has ``n_features`` rows, or as many as keys are
    wide.
    """
    given = {name: x for name, x in tensors.items() if x is not None or name in needs}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is {'None' if x is None else type(x).__name__}; expected a torch.Tensor")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}; the rules need a dense tensor: {name}.to_dense()")
        if name in ("k", "v") and x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected 4 dimensions [B, T, H, D]")
    _check_fit(given, causal, n_features)
    k = given["k"]
    if k.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"k is {k.dtype}; the rules take a floating-point dtype: {known}")


def _check_fit(given: dict[str, Tensor], causal: bool, n_features: int | None) -> None:
    k, q, v = given["k"], given.get("q"), given.get("v")
    b, t, h, size = k.shape
    n_features = size if n_features is None else n_features
    n_queries = t if causal or q is None or q.dim() != 4 else q.shape[1]
    d_value = 0 if v is None else v.shape[-1]
    expected = {"q": (b, n_queries, h, size), "v": (b, t, h, d_value), "k": k.shape}
    expected |= {"state": (b, h, n_features, d_value), "z": (b, h, n_features)}
    for name, tensor in given.items():
        # the others are gates
        shape = expected.get(name, (b, t, h))
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; k {tuple(k.shape)} asks for {shape}")
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device} but k is on {k.device}; move them to one device")
        if tensor.dtype != k.dtype and not (name in ("state", "z") and tensor.dtype == reference.state_dtype(k.dtype)):
            raise ValueError(f"{name} is {tensor.dtype} but k is {k.dtype}; give all inputs one dtype")
