"""The sum and delta rules compiled for CUDA: one launch forward, two backward (``csrc/recurrence.cu``)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fwp_lightning import compiled
from fwp_lightning.ops import chunked
from fwp_lightning.ops.operators import CompiledRule, Tensors

KERNEL = "recurrence.cu"
# of these float16 is widened to float32 beforehand
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# as many rows and columns of a memory as lie in the registers of one block of threads
MOST_KEYS = 512
MOST_VALUES = 256
OLDEST_CAPABILITY = (8, 0)


def why_not(k: Tensor) -> str | None:
    """Return the sentence why the kernel cannot take tensors like ``k``, or None; it is built if need be."""
    if k.device.type != "cuda":
        return f"backend 'cuda' cannot compute on {k.device}; move the tensors to a CUDA device, or choose auto"
    if k.dtype not in DTYPES:
        return f"backend 'cuda' has no {k.dtype}; give it float32 or half precision, or choose chunked"
    if not 1 <= k.shape[-1] <= MOST_KEYS:
        return f"K={k.shape[-1]} is outside the 1 to {MOST_KEYS} of backend 'cuda'; choose chunked"
    return _why_no_kernel(k.device)


@torch.compiler.assume_constant_result
def _why_no_kernel(device: torch.device) -> str | None:
    # a tracer looks through a cache, and would see a compiler at work
    return why_no_kernel(device)


@functools.cache
def why_no_kernel(device: torch.device) -> str | None:
    """Return the reason why the kernel cannot run on a CUDA device, or None; it is built if need be."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        older, oldest = (".".join(map(str, x)) for x in (capability, OLDEST_CAPABILITY))
        return f"backend 'cuda' needs compute capability {oldest}, {device} has {older}; choose chunked"
    return compiled.why_unavailable(KERNEL) or why_not_ready()


def why_not_ready() -> str | None:
    """Return what CUDA has against the built library, such as a driver that is older than the toolkit, or None."""
    try:
        compiled.raise_refused(KERNEL, compiled.library(KERNEL).fwp_recurrence_probe())
    except RuntimeError as error:
        return str(error)
    return None


def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.sum_rule``."""
    if not causal:
        # two matrix products: there is no recurrence to compile
        return chunked.sum_rule(q, k, v, state, causal=False)
    return _apply(q, k, v, None, state)


def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.delta_rule``."""
    return _apply(q, k, v, beta, state)


def _apply(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    o, last = RULE((), q, k, v, beta, state)
    return (None if q is None else o), last


class _Problem(ctypes.Structure):
    """``Problem`` of the CUDA source."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "steps", "heads", "keys", "values", "device")] + [
        (name, ctypes.c_void_p) for name in ("q", "k", "v", "beta", "state")
    ]


def _allocate(inputs: Tensors, *, keep: bool) -> Tensors:
    """Return outputs, last state and errors; the last two are float32 whatever the other tensors are."""
    q, k, v, beta, _ = inputs
    b, _, h, n_features = k.shape
    o = None if q is None else torch.empty_like(v)
    last = k.new_empty((b, h, n_features, v.shape[-1]), dtype=torch.float32)
    # the delta rule's kernel writes them whether or not a backward pass follows
    errors = None if beta is None else torch.empty_like(v, dtype=torch.float32)
    return [o, last, errors]


def _forward(inputs: Tensors, outputs: Tensors) -> None:
    o, last, errors = outputs
    _launch("forward", inputs, o, errors, last)


def _backward(inputs: Tensors, saved: Tensors, incoming: Tensors) -> Tensors:
    (_, k, v, beta, state), (errors,), (grad_o, grad_last) = inputs, saved, incoming
    b, _, h, n_features = k.shape
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o
    if grad_last is None:
        grad_last = k.new_zeros((b, h, n_features, v.shape[-1]), dtype=torch.float32)
    *gradients, _ = (None if x is None else torch.empty_like(x) for x in inputs)
    grad_state = torch.empty_like(grad_last)
    grad_k = gradients[1]
    # half of grad_k in float32, until the other half is known
    partial = grad_k if beta is None or k.dtype == torch.float32 else torch.empty_like(k, dtype=torch.float32)
    received = None if beta is None else torch.empty_like(v, dtype=torch.float32)
    _launch("backward", inputs, errors, grad_o, grad_last, received, partial, *gradients, grad_state)
    return [*gradients, None if state is None else grad_state]


def _launch(direction: str, inputs: Tensors, *buffers: Tensor | None) -> None:
    _, k, v, *_ = inputs
    device, stream = (k.device.index, torch.cuda.current_stream(k.device).cuda_stream) if k.is_cuda else (0, 0)
    problem = _Problem(*k.shape, v.shape[-1], device, *(None if x is None else x.data_ptr() for x in inputs))
    # the kernel makes that device the current one; here it becomes again what it was
    with torch.cuda.device_of(k):
        compiled.launch(KERNEL, direction, k.dtype, problem, *buffers, stream=stream)


RULE = CompiledRule(
    "cuda_recurrence",
    "CUDA",
    inputs="Tensor? q, Tensor k, Tensor v, Tensor? beta, Tensor? state",
    results=("o", "last"),
    saved=("errors",),
    allocate=_allocate,
    forward=_forward,
    backward=_backward,
)
