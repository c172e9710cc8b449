"""The compiled sum and delta recurrences beyond what every backend is asked for: fused maps, odd memory, tracers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import EXACT, NAMES, assert_same, call, leaves, make_inputs, results_and_gradients, weighted
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import elu

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.attention.layer import FastWeightMemory
from fwp_lightning.ops import recurrence

pytestmark = pytest.mark.skipif(
    compiled.why_unavailable("recurrence") is not None, reason=str(compiled.why_unavailable("recurrence"))
)

RULES = ["sum", "delta"]
FUSED = {
    "elu": ops.FusedMemory("elu"),
    "elu, readout": ops.FusedMemory("elu", attention_norm="readout", attention_norm_eps=1e-3),
    "elu, sum": ops.FusedMemory("elu", phi_norm="sum", key_norm_eps=1e-2, query_norm_eps=2e-2),
    "dpfp-1, sum": ops.FusedMemory("dpfp", 1, phi_norm="sum", key_norm_eps=1e-3, query_norm_eps=1e-3),
    "dpfp-3": ops.FusedMemory("dpfp", 3),
    "dpfp-3, sum, readout": ops.FusedMemory(
        "dpfp",
        3,
        phi_norm="sum",
        key_norm_eps=1e-3,
        query_norm_eps=1e-2,
        attention_norm="readout",
        attention_norm_eps=1e-2,
    ),
    "sum, readout": ops.FusedMemory(phi_norm="sum", attention_norm="readout", attention_norm_eps=1e-2),
}


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (512, 3), (3, 512), (96, 16), (17, 33)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("rule", RULES)
def test_memories_of_any_size_and_any_number_of_steps(rule: str, steps: int, sizes: tuple[int, int]) -> None:
    inputs = make_inputs(rule, 1, steps, 3, *sizes, seed=steps)
    ours, theirs = (results_and_gradients(rule, inputs, backend=name) for name in ("cpu", "reference"))
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("heads", [1, 5, 40], ids="{} heads".format)
def test_heads_that_do_not_fit_the_cache_together_go_in_groups(heads: int) -> None:
    # 40 memories of 64 x 64 in both layouts are 2.6 MB in float64
    inputs = make_inputs("delta", 2, 6, heads, 64, 64)
    ours, theirs = (results_and_gradients("delta", inputs, backend=name) for name in ("cpu", "reference"))
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_threads_gives_the_same_bits(rule: str) -> None:
    inputs = make_inputs(rule, 3, 37, 3, 21, 19, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(results_and_gradients(rule, inputs, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0], rtol=0, atol=0)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor that is made without numbers is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("steps", [0, 1, 6, 7])
@pytest.mark.parametrize("name", ["plain", "dpfp-3, sum, readout", "elu"])
@pytest.mark.parametrize("rule", RULES)
def test_results_are_written_whole(poisoned: None, rule: str, name: str, steps: int) -> None:
    memory = FUSED.get(name, ops.FusedMemory())
    for with_state in (True, False):
        inputs = fused_inputs(rule, memory, 2, steps, 3, 5, 3, with_state=with_state)
        for result in fused_results(memory, inputs).values():
            assert bool(result.isfinite().all())


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers laid out otherwise."""
    if how == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    if how == "with gaps":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if how == "off the boundary":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize("how", ["transposed", "with gaps", "off the boundary", "expanded"])
@pytest.mark.parametrize("rule", RULES)
def test_strides_change_nothing(rule: str, how: str) -> None:
    inputs = make_inputs(rule, 2, 9, 3, 16, 16, dtype=torch.float32)
    inputs = {n: x.contiguous() if how != "expanded" else x[:, :1].expand(x.shape) for n, x in inputs.items()}
    o, state = call(rule, {n: strided(x, how) for n, x in inputs.items()}, backend="cpu")
    expected_o, expected_state = call(rule, {n: x.contiguous() for n, x in inputs.items()}, backend="cpu")
    assert o is not None
    assert expected_o is not None
    torch.testing.assert_close(o, expected_o, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_that_come_expanded_or_not_at_all(rule: str) -> None:
    inputs = leaves(make_inputs(rule, 2, 9, 3, 5, 4))
    read: list[list[Tensor]] = []
    for backend in ("cpu", "reference"):
        o, state = call(rule, inputs, backend=backend)
        assert o is not None
        # the gradient of a sum is one number, expanded
        read.append(list(torch.autograd.grad(o.sum(), list(inputs.values()), retain_graph=True)))
        read[-1] += torch.autograd.grad(state.sum(), [x for n, x in inputs.items() if n != "q"])
    for ours, theirs in zip(*read, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_grows_with_steps_and_vectors_not_with_memories(rule: str) -> None:
    steps, n_features, d_value = 256, 64, 32
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    inputs = leaves(make_inputs(rule, 1, steps, 1, n_features, d_value, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(rule, inputs, backend="cpu")
    # queries, keys, values, outputs, errors, strengths and one state: nothing for a step but vectors
    assert sum(kept.values()) <= steps * (2 * n_features + 3 * d_value + 1) + n_features * d_value


def test_features_of_a_fused_map_are_not_kept() -> None:
    steps, size = 256, 16
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    memory = FastWeightMemory(AttentionConfig("delta", "dpfp", nu=3, phi_norm="sum"), size)
    q, k, v = (torch.randn(1, steps, 2, size, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, steps, 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        memory(q, k, v, beta)
    # DPFP-3 of keys alone would be 6 d numbers a step
    assert sum(kept.values()) <= steps * 2 * (5 * size + 1)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["q", "k", "v", "beta", "state"])
@pytest.mark.parametrize("rule", RULES)
def test_nan_stays_where_the_equations_put_it(rule: str, where: str) -> None:
    for with_state, at in itertools.product((True, False), (0, 1, 4, 6)):
        inputs: dict[str, Any] = make_inputs(rule, 1, 7, 2, 5, 4)
        if where not in inputs or (where == "state" and not with_state):
            continue
        if where == "state":
            inputs["state"][0, 1, 2, 3] = torch.nan
        elif where == "beta":
            inputs["beta"][0, at, 1] = torch.nan
        else:
            inputs[where][0, at, 1, 2] = torch.nan
        if not with_state:
            inputs["state"] = None
        ours, theirs = (call(rule, inputs, backend=name) for name in ("cpu", "reference"))
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine is not None
            assert expected is not None
            # a state has nothing of queries
            assert bool(expected.isnan().any()) or (where == "q" and expected is theirs[1])
            assert torch.equal(mine.isnan(), expected.isnan())


def test_gradients_through_a_memory_that_explodes_lose_no_digits() -> None:
    """Undoing writes from the last memory would: it is 1e10 times as large as the first."""
    inputs = make_inputs("delta", 1, 40, 1, 16, 16)
    inputs["k"] *= 3
    inputs["beta"] = torch.ones_like(inputs["beta"])
    ours, theirs = (results_and_gradients("delta", inputs, backend=name) for name in ("cpu", "reference"))
    assert theirs["last state"].abs().max() > 1e10 * inputs["state"].abs().max()
    for name, expected in theirs.items():
        # over the steps of each tensor, so that the small ones are looked at as closely as the large ones
        scale = expected.abs().amax(-1, keepdim=True)
        assert bool(((ours[name] - expected).abs() <= 1e-9 * scale).all()), name


def test_a_hundred_thousand_steps_lose_no_more_digits_than_a_thousand() -> None:
    steps = 100_000
    g = torch.Generator().manual_seed(2)
    q, k = (elu(torch.randn(1, steps, 1, 8, generator=g, dtype=torch.float64)) + 1 for _ in range(2))
    inputs = {"q": q / q.sum(-1, keepdim=True), "k": k / k.sum(-1, keepdim=True)}
    inputs["v"] = torch.randn(1, steps, 1, 8, generator=g, dtype=torch.float64)
    inputs["beta"] = torch.rand(1, steps, 1, generator=g, dtype=torch.float64)
    inputs = {n: x.float() for n, x in inputs.items()}
    ours = results_and_gradients("delta", inputs, backend="cpu")
    exact = results_and_gradients("delta", {n: x.double() for n, x in inputs.items()}, backend="chunked")
    for name in ("o", "grad q", "grad k", "grad v", "grad beta"):
        error, size = (
            x.detach().flatten(2).mean(-1).view(100, -1).mean(-1) for x in _error_and_size(ours, exact, name)
        )
        # keys of sum 1 never stretch the memory, so what one step rounds fades like what it wrote
        assert bool((error <= 1e-5 * size).all()), name


def test_a_sum_of_a_hundred_thousand_writes_is_as_exact_as_one_number_added_up() -> None:
    steps, unit = 100_000, 2**-24
    g = torch.Generator().manual_seed(3)
    q, k = (elu(torch.randn(1, steps, 1, 8, generator=g)) + 1 for _ in range(2))
    v, w = (torch.randn(1, steps, 1, 8, generator=g) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, last = ops.sum_rule(*leaves, backend="cpu")
    assert o is not None
    ours = {"o": o, **dict(zip(("q", "k", "v"), torch.autograd.grad(o, leaves, w), strict=True))}

    def running(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of a (x) b up to each step, and the deviation of a walk whose steps are their sizes."""
        sums = torch.einsum("tk,tv->tkv", a, b).cumsum(0)
        return sums, sums.square().cumsum(0).sqrt()

    q, k, v, w = (x.detach().double()[0, :, 0] for x in (q, k, v, w))
    memories, gradients = running(k, v), [x.flip(0) for x in running(q.flip(0), w.flip(0))]
    reads = {"o": (memories, q, "tkv,tk->tv"), "q": (memories, w, "tkv,tv->tk")}
    reads |= {"k": (gradients, v, "tkv,tv->tk"), "v": (gradients, k, "tkv,tk->tv")}
    for name, ((sums, walk), by, equation) in reads.items():
        error = (ours[name].detach().double()[0, :, 0] - torch.einsum(equation, sums, by)).abs()
        # each addition rounds by up to a unit of the sum so far, one way or the other: six deviations of that walk, in
        # all eight numbers of a vector the same way, and the rounding of the read-out itself
        bound = 6 * unit * torch.einsum(equation, walk + 8 * sums.abs(), by.abs())
        assert bool((error <= bound).all()), name
        # which is little of what is read
        assert float(error.norm()) <= 1e-5 * float(torch.einsum(equation, sums, by).norm()), name
    torch.testing.assert_close(
        last[0, 0].double(), memories[0][-1], rtol=0, atol=6 * unit * float(memories[1][-1].max())
    )


def _error_and_size(ours: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return (ours[name].double() - exact[name]).abs(), exact[name].abs()


# --- fused maps and normalisers ---------------------------------------------------------------------------------------


def fused_inputs(
    rule: str, memory: ops.FusedMemory, b: int, t: int, h: int, size: int, d_value: int, *, with_state: bool = True
) -> dict[str, Tensor]:
    """Like make_inputs, for keys before phi; z as features have it: positive."""
    inputs = make_inputs(rule, b, t, h, size, d_value)
    inputs["k"] = inputs["k"] * size**0.5
    if memory.feature_map == "identity":
        inputs["q"], inputs["k"] = inputs["q"].abs() + 0.1, inputs["k"].abs() + 0.1
    n_features = memory.n_features(size)
    del inputs["state"]
    if with_state:
        g = torch.Generator().manual_seed(5)
        inputs["state"] = torch.randn(b, h, n_features, d_value, generator=g, dtype=torch.float64)
        if memory.attention_norm == "readout":
            inputs["z"] = torch.rand(b, h, n_features, generator=g, dtype=torch.float64)
    return inputs


def fused_results(memory: ops.FusedMemory, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients_of(inputs, lambda x: ops.fused_rule(memory, x["q"], x["k"], x["v"], *_rest(x)))


def _rest(inputs: dict[str, Tensor]) -> list[Tensor | None]:
    return [inputs.get(name) for name in ("beta", "state", "z")]


def gradients_of(
    inputs: dict[str, Tensor], function: Callable[[dict[str, Tensor]], tuple[Tensor | None, ...]]
) -> dict[str, Tensor]:
    inputs = leaves(inputs)
    outputs = {n: x for n, x in zip(("o", "state", "z"), function(inputs), strict=True) if x is not None}
    gradients = torch.autograd.grad(weighted(list(outputs.values())), list(inputs.values()), materialize_grads=True)
    return {**outputs, **{f"grad {n}": g for n, g in zip(inputs, gradients, strict=True)}}


def phi(memory: ops.FusedMemory, x: Tensor, eps: float) -> Tensor:
    """Eqs. 29, 30 and 37, written out."""
    if memory.feature_map == "elu":
        x = elu(x) + 1
    elif memory.feature_map == "dpfp":
        u = torch.cat([torch.relu(x), torch.relu(-x)], -1)
        size = u.shape[-1]
        x = torch.stack([u[..., i] * u[..., (i + j) % size] for j in range(1, memory.nu + 1) for i in range(size)], -1)
    return x / (x.sum(-1, keepdim=True) + eps) if memory.phi_norm == "sum" else x


def unfused(memory: ops.FusedMemory, x: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """The reference rule on features; eqs. 18-19 for the read-out."""
    q, k = phi(memory, x["q"], memory.query_norm_eps), phi(memory, x["k"], memory.key_norm_eps)
    beta, state, z_0 = _rest(x)
    rule = "sum" if beta is None else "delta"
    o, last = call(rule, {"q": q, "k": k, "v": x["v"], "beta": beta, "state": state}, backend="reference")  # type: ignore[dict-item]
    if memory.attention_norm == "none":
        return o, last, None
    assert o is not None
    z = k.cumsum(1) + (0 if z_0 is None else z_0.unsqueeze(1))
    return o / ((z * q).sum(-1, keepdim=True) + memory.attention_norm_eps), last, z[:, -1]


@pytest.mark.parametrize("sizes", [(4, 1), (5, 3), (16, 16), (17, 20)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rule", RULES)
def test_fused_equals_the_equations_in_all_gradients(rule: str, name: str, steps: int, sizes: tuple[int, int]) -> None:
    memory = FUSED[name]
    for with_state in (True, False):
        inputs = fused_inputs(rule, memory, 2, steps, 2, *sizes, with_state=with_state)
        assert_same(fused_results(memory, inputs), gradients_of(inputs, lambda x: unfused(memory, x)), **EXACT)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rule", RULES)
def test_fused_gradients_are_those_of_finite_differences(rule: str, name: str) -> None:
    memory = FUSED[name]
    inputs = leaves(fused_inputs(rule, memory, 1, 3, 2, 4, 2))
    names = list(inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(names, tensors, strict=True))
        return tuple(y for y in ops.fused_rule(memory, x["q"], x["k"], x["v"], *_rest(x)) if y is not None)

    assert gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rule", RULES)
def test_fused_float32_error_is_at_most_twice_that_of_pytorch(rule: str, name: str) -> None:
    memory = FUSED[name]
    # where features are not normalised, the delta rule's memory grows by |k|^2 a step
    steps = 100 if rule == "sum" or memory.phi_norm == "sum" else 4
    inputs = {n: x.float() for n, x in fused_inputs(rule, memory, 2, steps, 2, 16, 24).items()}
    exact = gradients_of({n: x.double() for n, x in inputs.items()}, lambda x: unfused(memory, x))
    plain, ours = gradients_of(inputs, lambda x: unfused(memory, x)), fused_results(memory, inputs)
    for result, truth in exact.items():
        error, allowed = ((x[result].double() - truth).norm() for x in (ours, plain))
        # an error of a few roundings in all is none
        few = 1e-6 * truth.norm()
        assert error <= 2 * allowed + few, f"{result}: error {error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_sequence_may_be_split(rule: str, name: str) -> None:
    memory = FUSED[name]
    x = fused_inputs(rule, memory, 2, 9, 2, 5, 3)
    o, *last = ops.fused_rule(memory, x["q"], x["k"], x["v"], *_rest(x))
    assert o is not None
    for split in (0, 1, 4, 9):
        states: tuple[Tensor | None, ...] = (x["state"], x.get("z"))
        outputs = []
        for part in (slice(0, split), slice(split, None)):
            q, k, v, beta = (x[n][:, part] if n in x else None for n in ("q", "k", "v", "beta"))
            assert k is not None
            assert v is not None
            piece, *states = ops.fused_rule(memory, q, k, v, beta, *states)  # type: ignore[assignment]
            outputs.append(piece)
        torch.testing.assert_close(torch.cat(outputs, 1), o, **EXACT)  # type: ignore[arg-type]
        for ours, theirs in zip(states, last, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("extreme", [-1e4, -100.0, 100.0])
def test_elu_of_extreme_keys(extreme: float) -> None:
    memory = FUSED["elu"]
    inputs = {n: x.float() for n, x in fused_inputs("sum", memory, 1, 4, 1, 5, 3, with_state=False).items()}
    inputs["k"][0, 1, 0, 2] = extreme
    ours, theirs = fused_results(memory, inputs), gradients_of(inputs, lambda x: unfused(memory, x))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("where", ["q", "k", "z"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_maps_hide_no_nan(name: str, where: str) -> None:
    memory = FUSED[name]
    x = fused_inputs("delta", memory, 1, 6, 2, 5, 3)
    if where not in x:
        return
    x[where][(0, 0, 1) if where == "z" else (0, 3, 1, 2)] = torch.nan
    results = zip(ops.fused_rule(memory, x["q"], x["k"], x["v"], *_rest(x)), unfused(memory, x), strict=True)
    for ours, theirs in results:
        assert (ours is None) is (theirs is None)
        assert ours is None or torch.equal(ours.isnan(), theirs.isnan())  # type: ignore[union-attr]
    if where != "z":
        # each gradient that the forward pass made NaN is NaN
        assert bool(fused_results(memory, x)[f"grad {where}"][0, 3, 1].isnan().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    memory = FUSED["dpfp-3, sum, readout"]
    x = {n: y.to(dtype) for n, y in fused_inputs("delta", memory, 2, 21, 2, 6, 4).items()}
    x["state"], x["z"] = x["state"].float(), x["z"].float()
    o, state, z = ops.fused_rule(memory, x["q"], x["k"], x["v"], *_rest(x))
    expected = unfused(memory, {n: y.double() for n, y in x.items()})
    for ours, theirs, wide in zip((o, state, z), expected, (False, True, True), strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == (torch.float32 if wide else dtype)
        rounding = 0 if wide else torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding + 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("sum", "elu", attention_norm="readout"),
        AttentionConfig("delta", "dpfp", nu=2, phi_norm="sum", output_scale="rsqrt_d"),
        AttentionConfig("delta", "elu", phi_norm="sum", attention_norm="readout", key_norm_eps=1e-3),
    ],
    ids=["sum elu readout", "delta dpfp-2 sum", "delta elu sum readout"],
)
def test_the_layer_is_the_same_fused_and_unfused(config: AttentionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = ops.fused_rule
    monkeypatch.setattr(ops, "fused_rule", lambda *x: calls.append(1) or fused(*x))
    torch.manual_seed(0)
    attention = build_attention(config, 12, 2).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    results = []
    for fuses in (True, False):
        if not fuses:
            attention.memory.fused = None
        y, state = attention(x)
        z, _ = attention(x[:, :5], state)
        results.append([y, z, *torch.autograd.grad(weighted([y, z]), list(attention.parameters()))])
    assert len(calls) == 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("name", ["elu", "dpfp"])
def test_fused_under_autocast_computes_in_float32_from_half_precision(name: str) -> None:
    memory = FastWeightMemory(AttentionConfig("delta", name, phi_norm="sum"), 6)
    inputs = {n: x.bfloat16() for n, x in make_inputs("delta", 2, 21, 2, 6, 4).items() if n != "state"}
    results = []
    for fuses, narrow in ((True, True), (False, True), (True, False)):
        memory.fused = FastWeightMemory(memory.config, 6).fused if fuses else None
        x = leaves(inputs if narrow else {n: y.float() for n, y in inputs.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o, state = memory(x["q"], x["k"], x["v"], x["beta"])
            assert o.dtype == state.memory[0].dtype == torch.float32
            gradients = torch.autograd.grad(weighted([o, *state.memory]), list(x.values()))
        results.append([o, *state.memory, *gradients])
    fused, unfused, wide = results
    for ours, theirs, exact in zip(fused, unfused, wide, strict=True):
        # gradients are rounded once, to the 8 bits of their inputs; two float32 sums may fall on either side
        rounding = 2**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-5)
        torch.testing.assert_close(ours.float(), exact, rtol=rounding, atol=1e-5)


def test_what_a_fused_memory_lacks_leaves_the_layer_unfused() -> None:
    for config in (
        AttentionConfig("delta", "elu", phi_norm="sum", attention_norm="both"),
        AttentionConfig("sum", "elu", carried_query_gradient="none"),
        AttentionConfig("delta", "elu", phi_norm="sum", backend="chunked"),
        AttentionConfig("delta", "elu", phi_norm="sum", backend="cuda"),
        AttentionConfig("delta", "favor", phi_norm="sum"),
        AttentionConfig("fwm", "tanh"),
    ):
        assert FastWeightMemory(config, 8).fused is None
    assert FastWeightMemory(AttentionConfig("delta", "elu", phi_norm="sum", backend="cpu"), 8).fused is not None


def test_fused_refusals_name_what_does_not_fit() -> None:
    x = {n: y.float() for n, y in fused_inputs("delta", FUSED["dpfp-3"], 2, 4, 2, 5, 3).items()}
    q, k, v, beta, state = (x[n] for n in NAMES)
    with pytest.raises(ValueError, match=r"^state has shape \(2, 2, 5, 3\); k \(2, 4, 2, 5\) asks for \(2, 2, 30, 3\)"):
        ops.fused_rule(FUSED["dpfp-3"], q, k, v, beta, state[:, :, :5])
    with pytest.raises(ValueError, match=r"^z has shape \(2, 5\)"):
        ops.fused_rule(FUSED["elu, readout"], q, k, v, beta, None, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"has no feature_map=tanh; it has identity, elu, dpfp"):
        ops.fused_rule(ops.FusedMemory("tanh"), q, k, v, beta)
    with pytest.raises(ValueError, match=r"cannot compute on meta"):
        ops.fused_rule(ops.FusedMemory("elu"), *(y.to("meta") for y in (q, k, v, beta)))


# --- tracers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", *FUSED])
@pytest.mark.parametrize("rule", RULES)
def test_the_operator_is_what_its_registration_says(rule: str, name: str) -> None:
    memory = FUSED.get(name, ops.FusedMemory())
    for with_state in (True, False):
        x = leaves(fused_inputs(rule, memory, 2, 5, 2, 4, 3, with_state=with_state))
        arguments = (x["q"], x["k"], x["v"], *_rest(x), memory.flags(), memory.eps())
        torch.library.opcheck(torch.ops.fwp_lightning.recurrence.default, arguments)
        torch.library.opcheck(torch.ops.fwp_lightning.recurrence.default, (None, *arguments[1:]))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("delta", "elu", phi_norm="sum", backend="cpu"),
        AttentionConfig("sum", "dpfp", nu=2, attention_norm="readout"),
        AttentionConfig("delta", "favor", phi_norm="sum"),
    ],
    ids=["delta elu", "sum dpfp readout", "delta favor"],
)
def test_attention_compiles_as_one_graph(config: AttentionConfig, compiler: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention = build_attention(config, 12, 2).double().eval()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    function = torch.compile(attention, backend=compiler, fullgraph=True)
    results = []
    for module in (function, attention):
        y, state = module(x)
        results.append([y, *torch.autograd.grad(weighted([y, *state.memory]), list(attention.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_the_compiled_graph_holds_for_other_batches() -> None:
    torch._dynamo.reset()
    attention = build_attention(AttentionConfig("delta", "dpfp", phi_norm="sum"), 8, 2).double()
    function = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t in ((2, 5), (3, 8)):
        x = torch.randn(b, t, 8, dtype=torch.float64)
        torch.testing.assert_close(function(x)[0], attention(x)[0], **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_a_second_derivative_is_refused(rule: str) -> None:
    inputs = leaves(make_inputs(rule, 1, 5, 1, 4, 3))
    o, _ = call(rule, inputs, backend="cpu")
    assert o is not None
    with pytest.raises(RuntimeError, match="second derivatives of a memory"):
        torch.autograd.grad(o.sum(), [inputs["k"]], create_graph=True)


def test_errors_are_kept_only_for_a_backward_pass() -> None:
    inputs = make_inputs("delta", 1, 5, 1, 4, 3)
    tensors = [inputs.get(n) for n in (*NAMES, "z")]
    memory = ops.FusedMemory()
    keeping, not_keeping = (recurrence._allocate(tensors, memory.flags(), memory.eps(), keep=x) for x in (True, False))
    assert keeping[3].shape == inputs["v"].shape
    assert not_keeping[3] is None
