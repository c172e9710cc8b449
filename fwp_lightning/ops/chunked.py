"""The sum and delta rules in chunk-parallel matrix form: any device, no compiler. ``README.md`` here derives it.

Within a chunk of C steps everything is a matrix product; only the [K, V] state passes from chunk to chunk. The backward
pass is written by hand. It keeps keys and queries in this layout, the errors, three [C, C] matrices and one state per
chunk.

Legend: M = B H memories, N chunks of a segment, C steps of a chunk. Blocks are ``[N M, C, D]``, chunk after chunk, so
that ``chunk(N)`` gives the chunks in time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, baddbmm, bmm
from torch.autograd import Function

from fwp_lightning.ops import reference
from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.precision import without_autocast

# numbers of one tensor that are worked on at a time: a dozen such tensors should stay in a core's cache
SEGMENT_ON_CPU = 2**18
# elsewhere what counts is many products in one launch
SEGMENT = 2**26
# beyond it the triangular inverse is made of two halves and matrix products
SOLVED_DIRECTLY = 16


def chunk_size(n_features: int, d_value: int) -> int:
    """Return C, a power of two from 16 to 64: the states kept, K V / C a step, stay near the size of the inputs."""
    size = 16
    while size < 64 and size * (n_features + d_value) < n_features * d_value:
        size *= 2
    return size


@without_autocast
def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.sum_rule``."""
    if q is None or not causal:
        # one product over all steps: autograd's own gradient is as good
        dtype = reference.state_dtype(k.dtype)
        W = torch.einsum("bthk,bthv->bhkv", k.to(dtype), v.to(dtype))
        W = W if state is None else W + state
        return (None if q is None else torch.einsum("bthk,bhkv->bthv", q.to(dtype), W).to(k.dtype)), W
    if k.numel() == 0 or v.numel() == 0:
        return reference.sum_rule(q, k, v, state)
    return _apply(q, k, v, None, state)


@without_autocast
def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.delta_rule``: one unit-triangular inverse per chunk gives its corrected values."""
    if k.numel() == 0 or v.numel() == 0:
        return reference.delta_rule(q, k, v, beta, state)
    return _apply(q, k, v, beta.unsqueeze(-1), state)


def _apply(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    inputs = (q, k, v, beta, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, last = _Chunks.apply(*inputs, keep)
    return (None if q is None else o), last


@dataclass(frozen=True)
class _Segment:
    """Chunks that are worked on together: ``n`` of ``size`` steps each, from step ``start``."""

    start: int
    n: int
    size: int
    dtype: torch.dtype

    def of(self, x_BTHD: Tensor) -> Tensor:
        """Return the segment's part of a tensor as a view [N, B, H, C, D]."""
        part = x_BTHD[:, self.start : self.start + self.n * self.size]
        b, _, h, d = part.shape
        return part.view(b, self.n, self.size, h, d).permute(1, 0, 3, 2, 4)

    def blocks(self, x_BTHD: Tensor) -> Tensor:
        """Return it as blocks [N M, C, D], a copy unless they lie so already: not to be written to."""
        return self.of(x_BTHD).to(self.dtype).reshape(-1, self.size, x_BTHD.shape[-1])

    def store(self, blocks: Tensor, x_BTHD: Tensor) -> None:
        """Write blocks to the segment's steps of a tensor."""
        place = self.of(x_BTHD)
        place.copy_(blocks.view(place.shape))


def _segments(k: Tensor, d_value: int) -> list[_Segment]:
    b, steps, h, n_features = k.shape
    size, dtype = chunk_size(n_features, d_value), reference.state_dtype(k.dtype)
    budget = SEGMENT_ON_CPU if k.device.type == "cpu" else SEGMENT
    at_a_time = max(1, budget // (b * h * size * max(n_features, d_value)))
    whole, rest = divmod(steps, size)
    segments = [_Segment(n * size, min(at_a_time, whole - n), size, dtype) for n in range(0, whole, at_a_time)]
    return [*segments, _Segment(whole * size, 1, rest, dtype)] if rest else segments


class _Kept(NamedTuple):
    """What the backward pass needs of a segment, as blocks."""

    q: Tensor | None
    k: Tensor
    beta: Tensor | None
    errors: Tensor
    """E: v - W^T k at each step; v itself under the sum rule."""
    states: Tensor
    """[(N + 1) M, K, V]: before each chunk, and after the last."""
    scores: Tensor | None = None
    """tril(Q K^T)."""
    gram: Tensor | None = None
    """K K^T."""
    inverse: Tensor | None = None
    """(I + tril(K K^T, -1) diag(beta))^{-1}."""


class _Chunks(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        beta: Tensor | None,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        b, _, h, n_features = k.shape
        segments = _segments(k, v.shape[-1])
        shape = (b * h, n_features, v.shape[-1])
        W = v.new_zeros(shape, dtype=segments[0].dtype) if state is None else state.reshape(shape)
        o = torch.empty_like(v, memory_format=torch.contiguous_format) if q is not None else v.new_empty(0)
        kept = []
        for segment in segments:
            read, of_segment = _write_and_read(segment, W, (q, k, v, beta))
            if read is not None:
                segment.store(read, o)
            W = of_segment.states[-shape[0] :]
            if keep:
                kept.append(of_segment)
        ctx.segments, ctx.shape, ctx.dtype, ctx.from_state = segments, k.shape, k.dtype, state is not None
        ctx.save_for_backward(*itertools.chain.from_iterable(kept))
        return o, W.clone().view(b, h, *shape[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        width = len(_Kept._fields)
        kept = [_Kept(*ctx.saved_tensors[i : i + width]) for i in range(0, len(ctx.saved_tensors), width)]
        b, h, n_features, d_value = grad_last.shape
        there = (kept[0].q is not None, True, True, kept[0].beta is not None)
        gradients = [
            grad_last.new_empty(*ctx.shape[:3], size, dtype=ctx.dtype) if is_there else None
            for is_there, size in zip(there, (n_features, n_features, d_value, 1), strict=True)
        ]
        D = grad_last.clone(memory_format=torch.contiguous_format).view(b * h, n_features, d_value)
        for segment, of_segment in reversed(list(zip(ctx.segments, kept, strict=True))):
            parts = _gradients(segment, of_segment, grad_o, D)
            for part, gradient in zip(parts, gradients, strict=True):
                if part is not None and gradient is not None:
                    segment.store(part, gradient)
        return *gradients, D.view_as(grad_last) if ctx.from_state else None, None


def _write_and_read(
    segment: _Segment, W: Tensor, inputs: tuple[Tensor | None, Tensor, Tensor, Tensor | None]
) -> tuple[Tensor | None, _Kept]:
    """Return the outputs of a segment's queries, if there are any, and what it leaves; ``W`` is the state before it."""
    q, beta = (None if x is None else segment.blocks(x) for x in (inputs[0], inputs[3]))
    k, v = segment.blocks(inputs[1]), segment.blocks(inputs[2])
    n, m = segment.n, W.shape[0]
    states = W.new_empty((n + 1) * m, *W.shape[1:])
    states[:m] = W
    kept = _Kept(q, k, beta, v, states)
    if beta is None:
        written = v
        for before, after, kT_n, v_n in zip(*_consecutive(states, n), k.mT.chunk(n), v.chunk(n), strict=True):
            baddbmm(before, kT_n, v_n, out=after)
    else:
        kept = _corrected(n, kept)
        written = kept.errors * beta
    if q is None:
        return None, kept
    scores = bmm(q, k.mT).tril_()
    return bmm(q, states[:-m]).baddbmm_(scores, written), kept._replace(scores=scores)


def _consecutive(states: Tensor, n: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the states before and those after each of n chunks."""
    in_time = states.chunk(n + 1)
    return in_time[:-1], in_time[1:]


def _corrected(n: int, kept: _Kept) -> _Kept:
    """Write the delta rule's corrected values chunk by chunk, given the values as ``errors`` and ``states[:M]``."""
    _, k, beta, v, states, *_ = kept
    assert beta is not None
    gram = bmm(k, k.mT)
    inverse = unit_lower_inverse(gram * beta.mT)
    # not empty_like: a block that was not copied has the strides of the input
    errors, written = v.new_empty(v.shape), v.new_empty(v.shape)
    blocks = (x.chunk(n) for x in (k, k.mT, v, beta, inverse, errors, written))
    for before, after, k_n, kT_n, v_n, beta_n, inverse_n, errors_n, written_n in zip(
        *_consecutive(states, n), *blocks, strict=True
    ):
        bmm(inverse_n, baddbmm(v_n, k_n, before, alpha=-1), out=errors_n)
        torch.mul(errors_n, beta_n, out=written_n)
        baddbmm(before, kT_n, written_n, out=after)
    return kept._replace(errors=errors, gram=gram, inverse=inverse)


def unit_lower_inverse(A: Tensor) -> Tensor:
    """Return (I + tril(A, -1))^{-1} of matrices [.., C, C]."""
    size = A.shape[-1]
    if size <= SOLVED_DIRECTLY or size % 2:
        eye = torch.eye(size, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    half = size // 2
    top, bottom = unit_lower_inverse(torch.cat([A[:, :half, :half], A[:, half:, half:]])).chunk(2)
    inverse = torch.zeros_like(A)
    inverse[:, :half, :half] = top
    inverse[:, half:, half:] = bottom
    inverse[:, half:, :half] = bmm(bmm(bottom, A[:, half:, :half]), top).neg_()
    return inverse


def _gradients(segment: _Segment, kept: _Kept, grad_outputs: Tensor, D: Tensor) -> tuple[Tensor | None, ...]:
    """Return dq, dk, dv, dbeta of a segment, given D = dL/dW after it; leaves dL/dW before it in ``D``."""
    q, k, beta, errors, *_ = kept
    grad_o = None if q is None else segment.blocks(grad_outputs)
    written = errors if beta is None else errors * beta
    grad_written, grad_v, grad_k = _back_through_time(segment.n, kept, written, grad_o, D)
    started_T = kept.states[: -D.shape[0]].mT
    grad_q = grad_beta = None
    if q is not None and grad_o is not None:
        Z = bmm(grad_o, written.mT).tril_()
        grad_q = bmm(grad_o, started_T).baddbmm_(Z, k)
        grad_k.baddbmm_(Z.mT, q)
    if beta is not None and kept.gram is not None:
        Z = bmm(grad_v, errors.mT).tril_(-1)
        grad_beta = (grad_written * errors).sum(-1, keepdim=True) - (kept.gram * Z).sum(-2).unsqueeze(-1)
        Z *= beta.mT
        # Z and its transpose: a key is on either side of K K^T
        grad_k.baddbmm_(grad_v, started_T, alpha=-1).baddbmm_(Z + Z.mT, k, alpha=-1)
    return grad_q, grad_k, grad_v, grad_beta


def _back_through_time(
    n: int, kept: _Kept, written: Tensor, grad_o: Tensor | None, D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dU without what U does to later errors of its chunk, dL/dV, and the part U D^T of dL/dK.

    ``D`` goes back through the chunks, in place.
    """
    q, k, beta, *_ = kept
    grad_written = written.new_zeros(written.shape) if grad_o is None else bmm(kept.scores.mT, grad_o)  # type: ignore[union-attr]
    grad_k = k.new_empty(k.shape)
    grad_v = grad_written
    if beta is not None and kept.inverse is not None:
        grad_v = torch.empty_like(grad_written)
        back = (kept.inverse * beta).mT.chunk(n)
    kT_n = k.mT.chunk(n)
    reads = None if q is None or grad_o is None else (q.mT.chunk(n), grad_o.chunk(n))
    chunks = list(enumerate(zip(*(x.chunk(n) for x in (k, written, grad_written, grad_v, grad_k)), strict=True)))
    for i, (k_n, written_n, grad_written_n, grad_v_n, grad_k_n) in reversed(chunks):
        grad_written_n.baddbmm_(k_n, D)
        bmm(written_n, D.mT, out=grad_k_n)
        if reads is not None:
            D.baddbmm_(reads[0][i], reads[1][i])
        if beta is not None:
            bmm(back[i], grad_written_n, out=grad_v_n)
            D.baddbmm_(kT_n[i], grad_v_n, alpha=-1)
    return grad_written, grad_v, grad_k
