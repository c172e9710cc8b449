"""The sum and delta rules in chunk-parallel matrix form: any device, no compiler. ``README.md`` here derives it.

Within a chunk of C steps everything is a matrix product; only the [K, V] state passes from chunk to chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def chunk_size(n_features: int) -> int:
    """Return the steps per chunk: C^2 work inside a chunk against K V work between chunks."""
    return 32 if n_features <= 48 else 64


def _split(x_BTHD: Tensor, size: int) -> Tensor:
    """[B, T, H, D] -> [B, H, N, C, D], the tail filled with zeros, which neither write nor read anything."""
    b, t, h, d = x_BTHD.shape
    n = -(-t // size)
    x = pad(x_BTHD, (0, 0, 0, 0, 0, n * size - t))
    return x.view(b, n, size, h, d).permute(0, 3, 1, 2, 4)


def _join(o_BHNCD: Tensor, steps: int) -> Tensor:
    b, h, n, c, d = o_BHNCD.shape
    return o_BHNCD.permute(0, 2, 3, 1, 4).reshape(b, n * c, h, d)[:, :steps]


def _initial(state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    b, h = k.shape[:2]
    return v.new_zeros(b, h, k.shape[-1], v.shape[-1]) if state is None else state


def sum_rule(
    q: Tensor | None, k: Tensor, v: Tensor, state: Tensor | None, *, causal: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.sum_rule``: prefix sums of per-chunk outer products, then two matrix products."""
    if q is None or not causal:
        W = torch.einsum("bthk,bthv->bhkv", k, v)
        W = W if state is None else W + state
        return (None if q is None else torch.einsum("bthk,bhkv->bthv", q, W)), W
    steps, size = k.shape[1], chunk_size(k.shape[-1])
    q_c, k_c, v_c = (_split(x, size) for x in (q, k, v))
    W_0 = _initial(state, k_c, v_c)
    totals = torch.cumsum(torch.cat([W_0.unsqueeze(2), k_c.mT @ v_c], dim=2), dim=2)
    within = (q_c @ k_c.mT).tril() @ v_c
    return _join(q_c @ totals[:, :, :-1] + within, steps), totals[:, :, -1]


def delta_rule(
    q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Same function as ``reference.delta_rule``: one unit-triangular solve per chunk gives its corrected values.

    With A = strictly-lower(diag(beta) K K^T), the values really written are U = (I + A)^{-1} diag(beta) (V - K W_0).
    """
    steps, size = k.shape[1], chunk_size(k.shape[-1])
    k_c, v_c = _split(k, size), _split(v, size)
    beta_c = _split(beta.unsqueeze(-1), size)
    lower = (beta_c * k_c @ k_c.mT).tril(-1)
    solved = torch.linalg.solve_triangular(lower, beta_c * torch.cat([k_c, v_c], -1), upper=False, unitriangular=True)
    solved_k, solved_v = solved.split([k.shape[-1], v.shape[-1]], dim=-1)

    W = _initial(state, k_c, v_c)
    written, starts = [], []
    # unbind once: indexing inside the loop would make the backward pass quadratic in the number of chunks
    for k_n, sk_n, sv_n in zip(k_c.unbind(2), solved_k.unbind(2), solved_v.unbind(2), strict=True):
        u_n = sv_n - sk_n @ W
        starts.append(W)
        written.append(u_n)
        W = W + k_n.mT @ u_n
    if q is None:
        return None, W
    if not written:
        return torch.zeros_like(v), W
    q_c = _split(q, size)
    within = (q_c @ k_c.mT).tril() @ torch.stack(written, dim=2)
    return _join(q_c @ torch.stack(starts, dim=2) + within, steps), W
