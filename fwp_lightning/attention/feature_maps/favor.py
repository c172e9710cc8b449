"""FAVOR+: positive random features of the softmax kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from fwp_lightning import ops
from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap, in_full_precision


@FEATURE_MAPS.register("favor")
class Favor(FeatureMap):
    """FAVOR+: phi(x) = exp(-|x|^2/2) [exp(R x), exp(-R x)] / sqrt(2 m), R random.

    R ``[m, d_key]`` lives in a buffer, and the generator that draws it in the state dict, so that a resumed run draws
    what an undisturbed one would have drawn.
    """

    source = "Choromanski et al. 2021, Lemma 1; Schlag, Irie, Schmidhuber 2021, eqs. 31-32"
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
