"""phi: the maps that turn keys and queries into non-negative features whose dot product replaces softmax's kernel.

Every map is ``[B, T, H, D] -> [B, T, H, K]`` and computes in float32 (or float64) whatever autocast says: elu(x) + 1 in
bfloat16 is exactly 0 for x <= -8, and dividing by it ruins the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.ops.first_order import first_order
from fwp_lightning.ops.precision import outside_autocast
from fwp_lightning.registry import Registry

FEATURE_MAPS: Registry[type[FeatureMap]] = Registry("feature map")

Method = TypeVar("Method", bound=Callable[..., Any])


def in_full_precision(method: Method) -> Method:
    """Run a method outside autocast, tensors in half precision made float32: memories lose too much in 8 bits."""

    @functools.wraps(method)
    def wrapped(self: object, x: Tensor, *arguments: Any, **named: Any) -> Any:
        with outside_autocast(x.device):
            return method(self, *(_at_least_float32(a) for a in (x, *arguments)), **named)

    return cast(Method, wrapped)


def _at_least_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


class FeatureMap(nn.Module):
    """A feature map for keys of size ``d_key``; subclasses set ``n_out`` and write ``forward``.

    Keys and queries go through ``keys`` and ``queries``; only a map that treats them differently overrides those.
    """

    n_out: int

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__()
        self.d_key = d_key
        self.n_out = d_key

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``[B, T, H, n_out]`` of ``x`` ``[B, T, H, d_key]``."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """Return the features of keys."""
        return self(k)

    def queries(self, q: Tensor) -> Tensor:
        """Return the features of queries."""
        return self(q)

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """Return ``phi(k_t) . phi(q_n)`` as ``[B, H, N, T]`` for queries ``[B, N, H, D]`` and keys ``[B, T, H, D]``."""
        return ops.attention_weights(self.queries(q), self.keys(k))

    def start_sequence(self) -> None:
        """Called before the first keys of sequences that start from an empty memory: a random map may draw anew."""


@FEATURE_MAPS.register("identity")
class Identity(FeatureMap):
    """phi(x) = x: the linear attention of 1991, without a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@FEATURE_MAPS.register("tanh")
class Tanh(FeatureMap):
    """phi(x) = tanh(x): the keys of the fast weight memory (Schlag et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@FEATURE_MAPS.register("elu")
class Elu(FeatureMap):
    """phi(x) = elu(x) + 1 (eq. 30; Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = _EluFeatures.apply(x)
        return features


class _EluFeatures(Function):
    """elu(x) + 1 as exp(min(x, 0)) + max(x, 0): nothing is lost against the 1, and the derivative is the first term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.exp(x.clamp(max=0))
        ctx.save_for_backward(slope)
        return slope + x.clamp(min=0)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (slope,) = ctx.saved_tensors
        return (grad * slope,)


@FEATURE_MAPS.register("dpfp")
class Dpfp(FeatureMap):
    """DPFP-nu (eq. 37): products of u = [relu(x), relu(-x)] with its own cyclic shifts by 1 .. nu."""

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__(d_key, config)
        if config.nu > d_key - 1:
            raise ValueError(
                f"nu={config.nu} is over d_key-1={d_key - 1}: the shift by d_key={d_key} pairs relu(x) with relu(-x), "
                "which is always 0, and further shifts only repeat earlier products; choose a smaller nu"
            )
        self.nu = config.nu
        self.n_out = 2 * d_key * config.nu

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = _DpfpFeatures.apply(x, self.nu)
        return features

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        if q.shape[1] != 1:
            return super().kernel(q, k)
        return ops.dpfp_kernel(q[:, 0], k, self.nu).unsqueeze(2)

    def extra_repr(self) -> str:
        return f"nu={self.nu}, n_out={self.n_out}"


class _DpfpFeatures(Function):
    """Blocks j = 1 .. nu of u_i u_{i+j}; saves only x, since autograd would keep every shifted copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nu: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.nu = nu
        u = torch.cat([x, -x], dim=-1).relu_()
        return torch.cat([u * u.roll(-j, -1) for j in range(1, nu + 1)], dim=-1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        u = torch.cat([x, -x], dim=-1).relu_()
        grad_u = torch.zeros_like(u)
        for j, grad_j in enumerate(grad.chunk(ctx.nu, dim=-1), start=1):
            grad_u.addcmul_(grad_j, u.roll(-j, -1)).add_((grad_j * u).roll(j, -1))
        grad_u.mul_(u > 0)
        positive, negative = grad_u.chunk(2, dim=-1)
        return positive - negative, None


@FEATURE_MAPS.register("favor")
class Favor(FeatureMap):
    """FAVOR+ (eqs. 31-32; Choromanski et al. 2021): phi(x) = exp(-|x|^2/2) [exp(R x), exp(-R x)] / sqrt(2 m).

    R ``[m, d_key]`` lives in a buffer, and the generator that draws it in the state dict, so that a resumed run draws
    what an undisturbed one would have drawn.
    """

    directions: Tensor

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__(d_key, config)
        self.m = config.n_features
        self.n_out = 2 * self.m
        self.options = config.favor
        self.redraw = config.favor.redraw
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
        self.register_buffer("directions", torch.empty(self.m, d_key))
        self.resample()

    def resample(self) -> None:
        """Draw R anew: rows ~ N(0, I) up to their signs, by default orthogonal to each other in groups of d_key."""
        self.directions = self._draw(1)[0]

    def training_directions(self, n: int) -> Tensor:
        """Return R of the next ``n`` training sequences, ``[n, m, d_key]``, or ``[1, m, d_key]`` if never redrawn.

        What ``start_sequence`` would have drawn one by one, at a fraction of its cost.
        """
        if self.redraw == "never":
            return self.directions.unsqueeze(0)
        drawn = self._draw(n)
        self.directions = drawn[-1]
        return drawn

    def _draw(self, n: int) -> Tensor:
        inputs_first = self.options.features == "orthogonal_inputs"
        rows, size = (self.d_key, self.m) if inputs_first else (self.m, self.d_key)
        orthogonal = self.options.features != "independent"
        gaussian, squares = [], []
        for _ in range(n):
            gaussian.append(torch.randn(rows, size, generator=self.generator, device="cpu"))
            if orthogonal:
                shape = (-(-rows // size), size, size)
                squares.append(torch.randn(shape, generator=self.generator, device="cpu"))
        drawn = torch.stack(gaussian)
        if orthogonal:
            rotations = torch.linalg.qr(torch.stack(squares)).Q.mT.reshape(n, -1, size)[:, :rows]
            # norms of their own keep each row marginally Gaussian
            drawn = rotations * drawn.norm(dim=-1, keepdim=True)
        return (drawn.mT if inputs_first else drawn).to(self.directions)

    def forward(self, x: Tensor) -> Tensor:
        return self.queries(x)

    def start_sequence(self) -> None:
        """Draw R anew if the redraw policy says so; within a sequence keys and queries keep one matrix."""
        if self.redraw == "always" or (self.redraw == "training" and self.training):
            self.resample()

    def keys(self, k: Tensor) -> Tensor:
        """Return the features of keys."""
        return self._features(k, {"none": None, "sequence": (1, 3), "vector": (3,)}[self.options.stabilizer])

    def queries(self, q: Tensor) -> Tensor:
        """Return the features of queries; a constant of each query cancels in any normalised read-out."""
        return self._features(q, None if self.options.stabilizer == "none" else (3,))

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        if q.shape[1] != 1 or self.options.stabilizer == "vector":
            return super().kernel(q, k)
        k_HT = self._scaled(k).transpose(1, 2)
        offset: Tensor | float = 0.5 * math.log(2 * self.m)
        if self.options.stabilizer == "sequence":
            offset = offset + self._largest_exponent(k_HT, (2, 3))
        eps = self.options.kernel_eps / math.sqrt(2 * self.m)
        query = self.queries(q).squeeze(1)
        return ops.exponential_kernel(query, k_HT, self._signed_directions(k.dtype), offset, eps).unsqueeze(2)

    def _scaled(self, x: Tensor) -> Tensor:
        return x * self.d_key**-0.25 if self.options.scaling == "rsqrt_sqrt_d" else x

    def _signed_directions(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.directions, -self.directions]).to(dtype)

    def _largest_exponent(self, x: Tensor, over: tuple[int, ...]) -> Tensor:
        """Return the largest exponent of the features over some dimensions, as a constant."""
        x = x.detach()
        projected = linear(x, self.directions.to(x.dtype))
        return (projected.abs() - x.square().sum(-1, keepdim=True) / 2).amax(over, keepdim=True)

    @in_full_precision
    def _features(self, x: Tensor, shared_over: tuple[int, ...] | None) -> Tensor:
        x = self._scaled(x)
        # 1/sqrt(2m) goes into the exponent, as in the released code: it decides what underflows
        offset = x.square().sum(-1, keepdim=True) / 2 + 0.5 * math.log(2 * self.m)
        if shared_over is not None:
            offset = offset + self._largest_exponent(x, shared_over)
        exponent = linear(x, self._signed_directions(x.dtype)) - offset
        return ops.flushing_exp(exponent) + self.options.kernel_eps / math.sqrt(2 * self.m)

    def get_extra_state(self) -> Tensor:
        """Return the generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the generator's state."""
        self.generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        return f"m={self.m}, n_out={self.n_out}, {self.options}"
