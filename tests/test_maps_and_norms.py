"""What every registered feature map and normalisation of features keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rule_cases import EXACT
from torch import Tensor
from torch.autograd import gradcheck

from fwp_lightning.attention import FEATURE_MAPS, PHI_NORMS, AttentionConfig, FavorConfig, FeatureMap, build_attention

D, H = 6, 3


def map_of(name: str) -> FeatureMap:
    torch.manual_seed(5)
    config = AttentionConfig("sum", name, nu=2, n_features=10, favor=FavorConfig(redraw="never"))
    phi = FEATURE_MAPS[name](D, config)
    phi.make_parameters(H)
    return phi.double()


def vectors(seed: int = 0, scale: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, 5, H, D, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_kernel_is_the_dot_product_of_the_features(name: str) -> None:
    phi, k = map_of(name), vectors()
    for n_queries in (1, 3):
        q = vectors(1)[:, :n_queries]
        features = phi.queries(q), phi.keys(k)
        assert all(x.shape == (*y.shape[:3], phi.n_out) for x, y in zip(features, (q, k), strict=True))
        expected = torch.einsum("bnhk,bthk->bhnt", *features)
        torch.testing.assert_close(phi.kernel(q, k), expected, **EXACT)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    phi, x = map_of(name), vectors()[:1, :2].requires_grad_()
    parameters = tuple(phi.parameters())
    assert gradcheck(lambda x, *_: (phi.keys(x), phi.queries(x)), (x, *parameters))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_only_a_map_that_says_so_has_negative_features(name: str) -> None:
    features = map_of(name).keys(vectors(scale=3.0))
    assert bool((features < 0).any()) is FEATURE_MAPS[name].signed


@pytest.mark.parametrize("norm", PHI_NORMS)
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_map_goes_with_every_normalisation_that_takes_its_signs(name: str, norm: str) -> None:
    stable = FavorConfig(redraw="never")
    if FEATURE_MAPS[name].signed and not PHI_NORMS[norm].takes_signs:
        with pytest.raises(ValueError, match=f"feature_map={name} has features of both signs"):
            AttentionConfig("delta", name, phi_norm=norm)
        return
    config = AttentionConfig("delta", name, phi_norm=norm, n_features=4, favor=stable, key_norm_eps=1e-6)
    torch.manual_seed(5)
    layer = build_attention(dataclasses.replace(config, query_norm_eps=1e-6), 12, 3)
    x = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(0.5 * x)
    assert state.memory[0].dtype == torch.float32
    y.float().square().sum().backward()
    # relu of a bias-free projection and dpfp can leave single weights out, no matrix whole
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in layer.parameters())


@pytest.mark.parametrize("norm", [name for name in PHI_NORMS if name != "none"])
def test_a_normalisation_takes_the_scale_of_a_vector_out(norm: str) -> None:
    phi = vectors().abs()
    divided = PHI_NORMS[norm]().divide(phi, 0.0)
    torch.testing.assert_close(PHI_NORMS[norm]().divide(7 * phi, 0.0), divided, **EXACT)
    assert PHI_NORMS[norm].cancels_scale


@pytest.mark.parametrize("norm", PHI_NORMS)
def test_an_eps_keeps_features_that_are_all_zero_finite_and_so_their_gradient(norm: str) -> None:
    phi = torch.zeros(1, 1, 1, D, dtype=torch.float64, requires_grad=True)
    divided = PHI_NORMS[norm]().divide(phi, 1e-6)
    assert not divided.any()
    (gradient,) = torch.autograd.grad(divided.sum(), phi)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_map_says_what_it_computes_and_who_wrote_it(name: str) -> None:
    kind = FEATURE_MAPS[name]
    assert "(x)" in (kind.__doc__ or "").splitlines()[0] or "DPFP" in (kind.__doc__ or "")
    assert any(str(year) in kind.source for year in range(1990, 2027))
