"""phi: DPFP by explicit loops, ELU at its delicate end, and FAVOR+'s matrix, estimate, stabilizers and redraws."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fwp_lightning.attention import FEATURE_MAPS, AttentionConfig, FastWeightMemory, FavorConfig, FeatureMap

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def build(name: str, d_key: int, **options: Any) -> FeatureMap:
    return FEATURE_MAPS[name](d_key, AttentionConfig("sum", name, **options))


def favor(d_key: int = 8, m: int = 16, seed: int = 0, phi_norm: str = "none", **choices: Any) -> Any:
    torch.manual_seed(seed)
    return build("favor", d_key, n_features=m, phi_norm=phi_norm, favor=FavorConfig(**choices))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- all maps ---------------------------------------------------------------------------------------------------------

ALL = {"identity": 6, "tanh": 6, "elu": 6, "dpfp": 24, "favor": 20}


@pytest.mark.parametrize("name", ALL)
def test_n_out_is_the_size_of_the_features(name: str) -> None:
    phi = build(name, 6, nu=2, n_features=10)
    assert phi.n_out == ALL[name]
    assert phi(torch.zeros(2, 5, 3, 6)).shape == (2, 5, 3, ALL[name])
    assert phi(torch.zeros(0, 5, 3, 6)).shape == (0, 5, 3, ALL[name])


@pytest.mark.parametrize("name", ["elu", "dpfp", "favor"])
def test_kernel_features_are_never_negative(name: str) -> None:
    assert bool((build(name, 6, nu=2, n_features=10)(3 * normal(4, 50, 1, 6)) >= 0).all())


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("identity", {}),
        ("tanh", {}),
        ("elu", {}),
        ("dpfp", {}),
        *(
            ("favor", {"stabilizer": s, "scaling": c, "kernel_eps": e, "redraw": "never"})
            for s in ("none", "sequence", "vector")
            for c, e in (("none", 0.0), ("rsqrt_sqrt_d", 1e-2 if s == "none" else 0.0))
        ),
    ],
    ids=str,
)
def test_kernel_is_the_dot_product_of_the_features(name: str, choices: dict[str, Any], n_queries: int) -> None:
    # phi_norm is what the configuration asks for with stabilizer=vector; the map itself does not divide
    phi = build(name, 6, nu=2, n_features=10, phi_norm="sum" if choices else "none", favor=FavorConfig(**choices))
    q, k = normal(2, n_queries, 3, 6), normal(2, 7, 3, 6, seed=1)
    expected = torch.einsum("bthf,bnhf->bhnt", phi.keys(k), phi.queries(q))
    torch.testing.assert_close(phi.kernel(q, k), expected, **EXACT)


@pytest.mark.parametrize("name", ALL)
def test_maps_compute_in_float32_whatever_autocast_says(name: str) -> None:
    phi = build(name, 6, nu=2, n_features=10, favor=FavorConfig(redraw="never"))
    x = normal(2, 5, 3, 6).float()
    outside = phi(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = phi(x)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["elu", "dpfp", "favor"])
def test_memory_features_of_bfloat16_inputs_are_float32(name: str) -> None:
    config = AttentionConfig("sum", name, nu=2, n_features=10, favor=FavorConfig(redraw="never"))
    memory = FastWeightMemory(config, 6)
    x = normal(2, 5, 3, 6).bfloat16()
    exact = memory.query_features(x.float()), memory.key_features(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = memory.query_features(x), memory.key_features(x)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["elu", "dpfp", "favor"])
def test_phi_norm_sums_to_one(name: str) -> None:
    favor_config = FavorConfig(stabilizer="vector")
    memory = FastWeightMemory(AttentionConfig("delta", name, phi_norm="sum", nu=2, favor=favor_config), 6)
    for phi in (memory.query_features(normal(2, 9, 3, 6)), memory.key_features(normal(2, 9, 3, 6, seed=1))):
        assert phi is not None
        torch.testing.assert_close(phi.sum(-1), torch.ones(2, 9, 3, dtype=torch.float64), **EXACT)


def test_phi_norm_eps_guards_features_that_are_all_zero() -> None:
    config = AttentionConfig("delta", "dpfp", phi_norm="sum", nu=1, key_norm_eps=1e-6, query_norm_eps=1e-6)
    memory = FastWeightMemory(config, 4)
    q, k = memory.query_features(torch.zeros(1, 2, 1, 4)), memory.key_features(torch.zeros(1, 2, 1, 4))
    assert q is not None
    assert not q.any()
    assert not k.any()


# --- ELU + 1 ----------------------------------------------------------------------------------------------------------


def test_elu_is_x_plus_one_or_exp_and_keeps_its_relative_accuracy() -> None:
    x = torch.tensor([-80.0, -30.0, -17.5, -8.0, -1e-3, 0.0, 0.5, 20.0])
    expected = torch.where(x > 0, x.double() + 1, torch.exp(x.double()))
    torch.testing.assert_close(build("elu", 8)(x).double(), expected, rtol=1e-6, atol=0)
    assert bool((build("elu", 8)(x) > 0).all())


def test_elu_of_bfloat16_under_autocast_is_positive_and_float32() -> None:
    memory = FastWeightMemory(AttentionConfig("delta", "elu", phi_norm="sum"), 4)
    x = torch.full((1, 1, 1, 4), -50.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        phi = memory.key_features(x)
    assert phi.dtype == torch.float32
    torch.testing.assert_close(phi, torch.full((1, 1, 1, 4), 0.25))


def test_elu_gradients_are_those_of_finite_differences() -> None:
    assert gradcheck(build("elu", 5), normal(2, 3, 1, 5).requires_grad_())


@pytest.mark.parametrize("power", [1, 2], ids=["upstream without a graph", "upstream with a graph"])
@pytest.mark.parametrize("name", ["elu", "dpfp", "favor"])
def test_second_derivatives_are_right_or_refused_but_never_silently_wrong(name: str, power: int) -> None:
    phi = build(name, 5, nu=2, favor=FavorConfig(redraw="never", stabilizer="none"))
    x = normal(1, 1, 1, 5).requires_grad_()
    loss = (phi(x) ** power).sum()
    if name != "favor":
        with pytest.raises(RuntimeError, match=r"second derivatives .* feature map identity, tanh or favor"):
            torch.autograd.grad(loss, x, create_graph=True)
        return
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    step = 1e-5

    def slope_at(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad((phi(y) ** power).sum(), y)[0]

    expected = torch.stack(
        [
            (slope_at(x + step * e) - slope_at(x - step * e)).sum() / (2 * step)
            for e in torch.eye(5, dtype=torch.float64).view(5, 1, 1, 1, 5)
        ]
    )
    torch.testing.assert_close(curvature.flatten(), expected, rtol=1e-5, atol=1e-6)


# --- DPFP -------------------------------------------------------------------------------------------------------------


def explicit_dpfp(x: Tensor, nu: int) -> Tensor:
    """Eq. 37 for one vector: u_i u_{i+j}, j = 1 .. nu, i = 1 .. 2 d, indices cyclic."""
    u = [max(float(value), 0.0) for value in x] + [max(-float(value), 0.0) for value in x]
    n = len(u)
    return torch.tensor([u[i] * u[(i + j) % n] for j in range(1, nu + 1) for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize(("d_key", "nu"), [(2, 1), (5, 1), (5, 4), (8, 3)])
def test_dpfp_equals_equation_37(d_key: int, nu: int) -> None:
    x = normal(2, 3, 2, d_key)
    x[0, 0, 0] = 0
    phi = build("dpfp", d_key, nu=nu)(x)
    expected = torch.stack([explicit_dpfp(row, nu) for row in x.reshape(-1, d_key)]).view(2, 3, 2, 2 * d_key * nu)
    torch.testing.assert_close(phi, expected, **EXACT)


def test_dpfp_dot_products_do_not_depend_on_the_direction_of_the_shift() -> None:
    x, y = normal(1, 1, 1, 6), normal(1, 1, 1, 6, seed=1)
    phi = build("dpfp", 6, nu=3)

    def backwards(z: Tensor) -> Tensor:
        u = torch.cat([z.relu(), (-z).relu()], -1)
        return torch.cat([u * u.roll(j, -1) for j in (1, 2, 3)], -1)

    torch.testing.assert_close((phi(x) * phi(y)).sum(), (backwards(x) * backwards(y)).sum(), **EXACT)


@pytest.mark.parametrize("nu", [1, 4])
def test_dpfp_gradients_are_those_of_finite_differences(nu: int) -> None:
    assert gradcheck(build("dpfp", 5, nu=nu), normal(2, 3, 1, 5).requires_grad_())


def test_dpfp_features_are_linearly_independent_up_to_the_largest_nu() -> None:
    x = normal(3000, 1, 1, 8)
    for nu, rank in ((1, 16), (3, 48), (7, 112)):
        assert int(torch.linalg.matrix_rank(build("dpfp", 8, nu=nu)(x).view(3000, -1))) == rank


@pytest.mark.parametrize(("d_key", "nu"), [(8, 8), (8, 15), (2, 2), (1, 1)])
def test_a_nu_that_adds_nothing_is_refused_with_the_reason(d_key: int, nu: int) -> None:
    with pytest.raises(ValueError, match=rf"nu={nu} .*{d_key - 1}.*(0|repeat)"):
        build("dpfp", d_key, nu=nu)


def test_a_quarter_of_the_dpfp_features_of_gaussian_keys_is_not_zero() -> None:
    # u_i and u_{i+j} belong to different coordinates, and each is positive with probability 1/2
    x = normal(4000, 1, 1, 16)
    for nu in (1, 2, 3):
        count = (build("dpfp", 16, nu=nu)(x) > 0).sum(-1).double()
        assert float(count.mean()) == pytest.approx(8 * nu, abs=4 * float(count.std()) / math.sqrt(4000))


# --- FAVOR+ -----------------------------------------------------------------------------------------------------------


def test_favor_features_equal_equations_31_and_32() -> None:
    phi = favor(d_key=6, m=10, scaling="none", stabilizer="none", redraw="never", kernel_eps=1e-4)
    x = normal(2, 3, 1, 6)
    R = phi.directions.double()
    assert R.shape == (10, 6)
    h = torch.exp(-x.square().sum(-1, keepdim=True) / 2)
    expected = torch.cat([h * torch.exp(x @ R.T) + 1e-4, h * torch.exp(-x @ R.T) + 1e-4], -1) / math.sqrt(20)
    torch.testing.assert_close(phi(x), expected, **EXACT)


def test_the_random_matrix_is_a_buffer_and_no_parameter() -> None:
    phi = favor()
    assert "directions" in dict(phi.named_buffers())
    assert "directions" in phi.state_dict()
    assert not list(phi.parameters())
    assert phi.double().directions.dtype == torch.float64
    phi.resample()
    assert phi.directions.dtype == torch.float64
    assert "directions" in dict(phi.named_buffers())


def test_directions_are_orthogonal_in_groups_of_the_input_size() -> None:
    R = favor(d_key=8, m=20).directions.double()
    for rows in (R[:8], R[8:16], R[16:]):
        gram = rows @ rows.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-4)
    assert float((R[:8] @ R[8:16].T).abs().max()) > 0.1
    # coordinates, unlike features, are not orthogonal: that was the released language model's mistake
    assert float((R.T @ R).fill_diagonal_(0).abs().max()) > 0.1


def test_independent_directions_are_not_orthogonal() -> None:
    R = favor(d_key=8, m=8, features="independent").directions
    assert float((R @ R.T).fill_diagonal_(0).abs().max()) > 0.5


@pytest.mark.parametrize(("d_key", "m"), [(16, 8), (16, 24), (10, 4)])
def test_released_directions_are_orthogonal_by_input_in_groups_of_m(d_key: int, m: int) -> None:
    phi = favor(d_key=d_key, m=m, features="orthogonal_inputs")
    inputs = phi.directions.double().T
    assert inputs.shape == (d_key, m)
    for rows in inputs.split(m):
        gram = rows @ rows.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-4)
    squared = []
    for _ in range(1500):
        phi.resample()
        squared.append(phi.directions.double().square().sum(0))
    # |r|^2 of a standard Gaussian in m dimensions: mean m, variance 2 m; 5 standard errors of 1500 draws
    assert float((torch.stack(squared).mean(0) - m).abs().max()) < 5 * math.sqrt(2 * m / 1500)


def test_released_directions_estimate_a_smaller_kernel() -> None:
    phi = favor(d_key=16, m=64, features="orthogonal_inputs", scaling="none", redraw="always")
    q, k = 0.25 * normal(1, 1, 1, 16), 0.25 * normal(1, 40, 1, 16, seed=1)
    estimates = []
    for _ in range(1000):
        phi.start_sequence()
        estimates.append(phi.kernel(q, k).flatten())
    ratio = torch.stack(estimates).mean(0) / torch.exp((k @ q.mT).flatten())
    # orthogonal features would give 1 up to 0.01
    assert float(ratio.mean()) < 0.985


@pytest.mark.parametrize("features", ["orthogonal", "independent"])
def test_each_direction_is_marginally_gaussian_up_to_its_sign(features: str) -> None:
    phi = favor(d_key=8, m=20, features=features)
    draws = []
    for _ in range(1500):
        phi.resample()
        draws.append(phi.directions.double().clone())
    R = torch.stack(draws)
    # |r|^2 of a standard Gaussian in 8 dimensions: mean 8, variance 16; 5 standard errors of 1500 draws
    squared = R.square().sum(-1)
    assert float((squared.mean(0) - 8).abs().max()) < 5 * math.sqrt(16 / 1500)
    assert float((squared.var(0) - 16).abs().max()) < 6
    # E[r r^T] = I for every row: diagonal entries have variance 2, others 1
    second = torch.einsum("nmi,nmj->mij", R, R) / 1500
    assert float((second - torch.eye(8)).abs().max()) < 5.5 * math.sqrt(2 / 1500)


def test_the_norm_of_a_direction_does_not_depend_on_the_others() -> None:
    phi = favor(d_key=8, m=8)
    norms = []
    for _ in range(1500):
        phi.resample()
        norms.append(phi.directions.double().norm(dim=-1))
    correlation = torch.corrcoef(torch.stack(norms).T)
    # 5.5 standard errors of a correlation over 1500 draws
    assert float(correlation.fill_diagonal_(0).abs().max()) < 5.5 / math.sqrt(1500)


@pytest.mark.parametrize("scaling", ["none", "rsqrt_sqrt_d"])
@pytest.mark.parametrize("features", ["orthogonal", "independent"])
def test_the_kernel_estimate_is_unbiased(features: str, scaling: str) -> None:
    phi = favor(d_key=8, m=32, features=features, scaling=scaling, stabilizer="none", redraw="always")
    size = 0.25 if scaling == "none" else 0.4
    q, k = size * normal(1, 1, 1, 8), size * normal(1, 5, 1, 8, seed=1)
    estimates = []
    for _ in range(2000):
        phi.start_sequence()
        estimates.append(phi.kernel(q, k).flatten())
    estimates = torch.stack(estimates)
    expected = torch.exp((k @ q.mT).flatten() / (math.sqrt(8) if scaling == "rsqrt_sqrt_d" else 1))
    error = estimates.std(0) / math.sqrt(2000)
    # the check means something only if a bias of 2 % would show
    assert float((error / expected).max()) < 0.01
    assert float(((estimates.mean(0) - expected) / error).abs().max()) < 4.5


def readout(
    stabilizer: str, rule: str, q: Tensor, k: Tensor, dtype: torch.dtype = torch.float64, **more: Any
) -> Tensor:
    norms = {"sum": {"attention_norm": "readout"}, "delta": {"phi_norm": "sum"}}[rule]
    choices = {"stabilizer": stabilizer, "redraw": "never", **more}
    config = AttentionConfig(
        rule, "favor", n_features=24, attention_norm_eps=0.0, favor=FavorConfig(**choices), **norms
    )
    torch.manual_seed(3)
    memory = FastWeightMemory(config, k.shape[-1]).to(dtype)
    # with 12 value dimensions: the identity, so that the output is the attention itself
    v = torch.eye(k.shape[1], dtype=dtype).expand(k.shape[0], k.shape[2], -1, -1).transpose(1, 2)
    beta = torch.full(k.shape[:3], 0.7, dtype=dtype)
    # read after the last write: what a constant of the whole sequence may be part of
    return memory.read(q.to(dtype), memory.write(k.to(dtype), v, beta))


@pytest.mark.parametrize(
    ("rule", "stabilizer"), [("sum", "sequence"), ("delta", "sequence"), ("delta", "vector")], ids=str
)
def test_a_stabilizer_leaves_the_normalised_readout_unchanged(rule: str, stabilizer: str) -> None:
    q, k = 1.5 * normal(2, 12, 2, 8), 1.5 * normal(2, 12, 2, 8, seed=1)
    plain, stabilised = (readout(name, rule, q, k) for name in ("none", stabilizer))
    torch.testing.assert_close(stabilised, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "stabilizer"), [("sum", "sequence"), ("delta", "sequence"), ("delta", "vector")], ids=str
)
def test_a_stabilizer_leaves_the_readout_unchanged_with_a_kernel_eps_or_the_pair_is_refused(
    rule: str, stabilizer: str
) -> None:
    q, k = 1.5 * normal(2, 12, 2, 8), 1.5 * normal(2, 12, 2, 8, seed=1)
    plain = readout("none", rule, q, k, kernel_eps=1e-2)
    refusal = ""
    try:
        torch.testing.assert_close(readout(stabilizer, rule, q, k, kernel_eps=1e-2), plain, rtol=1e-9, atol=1e-10)
    except ValueError as error:
        refusal = str(error)
    assert not refusal or "kernel_eps" in refusal


def test_a_stabilizer_survives_float32_where_the_plain_features_underflow() -> None:
    # |x|^2 = 400 for keys and queries: exp(-200) is 0 in float32
    direction = torch.nn.functional.normalize(normal(1, 6, 1, 8), dim=-1)
    k = 20 * direction
    q = k.flip(1)
    truth = readout("none", "delta", q, k, scaling="none")
    plain = readout("none", "delta", q, k, torch.float32, scaling="none")
    stabilised = readout("vector", "delta", q, k, torch.float32, scaling="none")
    assert not bool(plain.isfinite().all())
    # exponents near 200 carry an absolute error of about 200 * 2^-23 each
    torch.testing.assert_close(stabilised.double(), truth, rtol=1e-2, atol=1e-3)


def directions_seen(phi: Any, training: bool, forwards: int = 3) -> int:
    phi.train(training)
    seen = [phi.directions.clone()]
    for _ in range(forwards):
        phi.start_sequence()
        phi.kernel(normal(1, 1, 1, 8), normal(1, 3, 1, 8))
        seen.append(phi.directions.clone())
    return sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("redraw", "training", "draws"),
    [
        ("never", True, 0),
        ("never", False, 0),
        ("training", True, 3),
        ("training", False, 0),
        ("always", True, 3),
        ("always", False, 3),
    ],
)
def test_redraw_policies(redraw: str, training: bool, draws: int) -> None:
    assert directions_seen(favor(redraw=redraw), training) == draws


@pytest.mark.parametrize("n_queries", [1, 2])
def test_keys_and_queries_of_one_forward_use_one_matrix(n_queries: int) -> None:
    phi = favor(d_key=8, m=6, redraw="always", stabilizer="none", scaling="none")
    q, k = normal(1, n_queries, 1, 8), normal(1, 4, 1, 8, seed=1)
    kernel = phi.kernel(q, k)
    phi.redraw = "never"
    torch.testing.assert_close(phi.kernel(q, k), kernel, **EXACT)


def test_the_state_dict_continues_the_same_draws() -> None:
    phi = favor(redraw="always")
    phi.resample()
    saved = copy.deepcopy(phi.state_dict())
    expected = []
    for _ in range(3):
        phi.resample()
        expected.append(phi.directions.clone())
    other = favor(seed=77, redraw="always")
    other.load_state_dict(saved)
    torch.testing.assert_close(other.directions, saved["directions"], rtol=0, atol=0)
    for matrix in expected:
        other.resample()
        torch.testing.assert_close(other.directions, matrix, rtol=0, atol=0)


def test_the_seed_decides_the_matrix_and_drawing_it_leaves_the_global_generator_alone() -> None:
    assert torch.equal(favor(seed=1).directions, favor(seed=1).directions)
    assert not torch.equal(favor(seed=1).directions, favor(seed=2).directions)
    phi = favor()
    state = torch.get_rng_state()
    phi.resample()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stabilizer", ["none", "sequence"])
def test_favor_gradients_are_those_of_the_released_formula(stabilizer: str) -> None:
    q, k = normal(1, 4, 1, 5), normal(1, 4, 1, 5, seed=1)
    gradients = []
    for name in ("none", stabilizer):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        y = readout(name, "sum", a, b)
        gradients.append(
            torch.autograd.grad((y * torch.sin(torch.arange(y.numel()).double()).view_as(y)).sum(), (a, b))
        )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    phi = favor(d_key=5, m=3, stabilizer="none", redraw="never").double()
    assert gradcheck(phi, k.clone().requires_grad_())
