"""A learned map of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fwp_lightning.attention.config import AttentionConfig
from fwp_lightning.attention.feature_maps.feature_map import FEATURE_MAPS, FeatureMap, in_full_precision


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(FeatureMap):
    """phi(x) = [softmax(M x), softmax(-M x)], M learned for each head, one for keys and one for queries.

    Each exponential of the source is divided by the sum of its half, which cannot overflow. The source learns M to
    imitate the weights of a softmax attention; here M starts as the identity, as there, and is trained with the model.
    """

    source = "Zhang et al. 2024 (Hedgehog, arXiv 2402.04347)"

    def __init__(self, d_key: int, config: AttentionConfig) -> None:
        super().__init__(d_key, config)
        self.n_out = 2 * d_key

    def make_parameters(self, n_heads: int) -> None:
        """Make M ``[H, D, D]`` of keys and of queries."""
        identity = torch.eye(self.d_key).expand(n_heads, -1, -1)
        self.M_k, self.M_q = (nn.Parameter(identity.clone()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.queries(x)

    def keys(self, k: Tensor) -> Tensor:
        """Return the features of keys."""
        return self._features(k, self.M_k)

    def queries(self, q: Tensor) -> Tensor:
        """Return the features of queries."""
        return self._features(q, self.M_q)

    @in_full_precision
    def _features(self, x: Tensor, M: Tensor) -> Tensor:
        projected = torch.einsum("bthd,hed->bthe", x, M.to(x.dtype))
        return torch.cat([torch.softmax(projected, -1), torch.softmax(-projected, -1)], dim=-1)
