"""The ops against equations written out with an explicit W, and every backend against the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_cases import EXACT, SMALL, assert_same, leaves, weighted
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import elu, normalize

from fwp_lightning import ops
from fwp_lightning.ops import chunked

RULES: dict[str, Callable[..., Any]] = {"sum": ops.sum_rule, "delta": ops.delta_rule, "fwm": ops.fwm_rule}
# what runs on the CPU
CASES = [(rule, backend) for rule in RULES for backend in ops.backends_of(rule, SMALL)]
FAST = [(rule, backend) for rule, backend in CASES if backend != "reference"] + [(rule, "auto") for rule in RULES]
LENGTHS = [1, 2, 31, 33, 63, 65, 100, 130]
SIZES = {"K=13, V=5": (2, 2, 13, 5), "K=50, V=3": (1, 2, 50, 3)}
NAMES = ("q", "k", "v", "beta", "state")


def make_inputs(
    rule: str,
    b: int,
    t: int,
    h: int,
    n_features: int,
    d_value: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs by name; keys have norms near 1, so that the delta rule neither explodes nor forgets at once."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "q": normal(b, t, h, n_features),
        "k": normal(b, t, h, n_features) / math.sqrt(n_features),
        "v": normal(b, t, h, d_value),
        "beta": torch.rand(b, t, h, generator=g, dtype=torch.float64),
        "state": normal(b, h, n_features, d_value),
    }
    if rule == "sum":
        del inputs["beta"]
    return {name: x.to(dtype) for name, x in inputs.items()}


def call(rule: str, inputs: dict[str, Tensor | None], **options: Any) -> tuple[Tensor | None, Tensor]:
    positional = [inputs[name] for name in ("q", "k", "v", *(() if rule == "sum" else ("beta",)))]
    return RULES[rule](*positional, inputs.get("state"), **options)


def explicit(rule: str, inputs: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The paper's own form, one head and one step at a time: W is value x key, y = W q (eqs. 17, 20-25, FWM)."""
    q, k, v, beta, state = (inputs.get(name) for name in NAMES)
    assert q is not None
    assert k is not None
    assert v is not None
    b, t, h, n_features = k.shape
    outputs = torch.zeros(b, t, h, v.shape[-1], dtype=k.dtype)
    last = torch.zeros(b, h, n_features, v.shape[-1], dtype=k.dtype)
    for i in range(b):
        for j in range(h):
            W = torch.zeros(v.shape[-1], n_features, dtype=k.dtype) if state is None else state[i, j].T.clone()
            for s in range(t):
                key, value = k[i, s, j], v[i, s, j]
                if rule == "sum":
                    W = W + torch.outer(value, key)
                else:
                    assert beta is not None
                    old = W @ key
                    new = beta[i, s, j] * value + (1 - beta[i, s, j]) * old
                    W = W - torch.outer(old, key) + torch.outer(new, key)
                if rule == "fwm" and (s > 0 or state is not None):
                    W = W / max(1.0, float(W.square().sum()) ** 0.5)
                outputs[i, s, j] = W @ q[i, s, j]
            last[i, j] = W.T
    return outputs, last


def results_and_gradients(rule: str, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    inputs = leaves(inputs)
    o, state = call(rule, inputs, **options)
    assert o is not None
    gradients = torch.autograd.grad(weighted([o, state]), list(inputs.values()))
    return {"o": o, "last state": state, **{f"grad {n}": g for n, g in zip(inputs, gradients, strict=True)}}


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "empty"])
@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_equals_the_equations_with_an_explicit_memory(rule: str, backend: str, with_state: bool) -> None:
    inputs: dict[str, Tensor | None] = dict(make_inputs(rule, 2, 7, 2, 5, 3))
    if not with_state:
        inputs["state"] = None
    o, state = call(rule, inputs, backend=backend)
    expected_o, expected_state = explicit(rule, inputs)
    torch.testing.assert_close(o, expected_o, **EXACT)
    torch.testing.assert_close(state, expected_state, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_reference_gradients_are_those_of_finite_differences(rule: str) -> None:
    inputs = leaves(make_inputs(rule, 1, 3, 2, 3, 2))
    names = list(inputs)
    assert gradcheck(
        lambda *x: call(rule, dict(zip(names, x, strict=True)), backend="reference"), tuple(inputs.values())
    )


@pytest.mark.parametrize("scale", [0.2, 3.0], ids=["norm under 1", "norm over 1"])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "empty"])
def test_scan_gradients_of_fwm_are_those_of_finite_differences(with_state: bool, scale: float) -> None:
    inputs = make_inputs("fwm", 2, 4, 1, 3, 2)
    inputs["v"] *= scale
    inputs["state"] *= 0.1 * scale
    if not with_state:
        del inputs["state"]
    inputs = leaves(inputs)
    names = list(inputs)
    assert gradcheck(lambda *x: call("fwm", dict(zip(names, x, strict=True)), backend="scan"), tuple(inputs.values()))


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_chunked_gradients_are_those_of_finite_differences_across_a_chunk_border(rule: str) -> None:
    inputs = leaves(make_inputs(rule, 1, 34, 1, 2, 1))
    names = list(inputs)
    assert gradcheck(lambda *x: call(rule, dict(zip(names, x, strict=True)), backend="chunked"), tuple(inputs.values()))


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize(("rule", "backend"), FAST)
def test_backends_equal_the_reference_in_outputs_state_and_all_gradients(
    rule: str, backend: str, steps: int, size: tuple[int, int, int, int]
) -> None:
    b, h, n_features, d_value = size
    inputs = make_inputs(rule, b, steps, h, n_features, d_value, seed=steps)
    ours, theirs = (results_and_gradients(rule, inputs, backend=name) for name in (backend, "reference"))
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("b", [0, 1], ids=["empty batch", "one sequence"])
@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_an_empty_batch_and_a_single_head_work(rule: str, backend: str, b: int) -> None:
    inputs = make_inputs(rule, b, 35, 1, 17, 4)
    ours = results_and_gradients(rule, inputs, backend=backend)
    assert ours["o"].shape == (b, 35, 1, 4)
    assert_same(ours, results_and_gradients(rule, inputs, backend="reference"), **EXACT)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_an_empty_sequence_returns_no_outputs_and_the_state_as_it_was(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 2, 0, 3, 5, 4)
    o, state = call(rule, inputs, backend=backend)
    assert o is not None
    assert o.shape == (2, 0, 3, 4)
    torch.testing.assert_close(state, inputs["state"], rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_no_queries_only_write(rule: str, backend: str) -> None:
    inputs: dict[str, Any] = make_inputs(rule, 2, 35, 2, 7, 4)
    whole = results_and_gradients(rule, inputs, backend=backend)
    writing = leaves({name: x for name, x in inputs.items() if name != "q"})
    o, state = call(rule, {**writing, "q": None}, backend=backend)
    assert o is None
    torch.testing.assert_close(state, whole["last state"], **EXACT)
    read = leaves(inputs)
    expected = torch.autograd.grad(weighted([call(rule, read, backend="reference")[1]]), [read[n] for n in writing])
    for ours, theirs in zip(torch.autograd.grad(weighted([state]), list(writing.values())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("backend", ["auto", *ops.backends_of("sum", SMALL)])
@pytest.mark.parametrize("steps", [1, 33])
def test_non_causal_reads_every_query_from_the_last_state(backend: str, steps: int) -> None:
    inputs = leaves(make_inputs("sum", 2, steps, 2, 7, 4))
    o, state = call("sum", inputs, causal=False, backend=backend)
    W = inputs["state"] + sum(inputs["k"][:, t].unsqueeze(-1) * inputs["v"][:, t].unsqueeze(-2) for t in range(steps))
    expected = torch.stack([torch.einsum("bhkv,bhk->bhv", W, q) for q in inputs["q"].unbind(1)], 1)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(state, W, **EXACT)
    ours, theirs = (torch.autograd.grad(weighted([y]), list(inputs.values())) for y in (o, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_non_contiguous_inputs_give_the_same(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 2, 35, 3, 6, 4)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    ours, theirs = (results_and_gradients(rule, x, backend=backend) for x in (strided, inputs))
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_splitting_anywhere_and_passing_the_state_on_changes_nothing(rule: str, backend: str) -> None:
    steps = 68
    inputs = make_inputs(rule, 1, steps, 2, 6, 3)
    inputs.pop("state")
    o, state = call(rule, inputs, backend=backend)
    # fwm with no steps before the split would mean an empty memory that is not new
    for split in range(1, steps + 1, 1 if backend != "reference" else 7):
        first_o, middle = call(rule, {n: x[:, :split] for n, x in inputs.items()}, backend=backend)
        rest = {**{n: x[:, split:] for n, x in inputs.items()}, "state": middle}
        second_o, last = call(rule, rest, backend=backend)
        assert first_o is not None
        assert second_o is not None
        torch.testing.assert_close(torch.cat([first_o, second_o], 1), o, **EXACT)
        torch.testing.assert_close(last, state, **EXACT)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_gradients_flow_through_a_state_that_is_passed_on(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 2, 40, 1, 6, 3)
    whole = results_and_gradients(rule, inputs, backend=backend)
    parts = leaves(inputs)
    timed = {n: x for n, x in parts.items() if n != "state"}
    first_o, middle = call(rule, {**{n: x[:, :33] for n, x in timed.items()}, "state": parts["state"]}, backend=backend)
    second_o, last = call(rule, {**{n: x[:, 33:] for n, x in timed.items()}, "state": middle}, backend=backend)
    assert first_o is not None
    assert second_o is not None
    gradients = torch.autograd.grad(weighted([torch.cat([first_o, second_o], 1), last]), list(parts.values()))
    for name, gradient in zip(parts, gradients, strict=True):
        torch.testing.assert_close(gradient, whole[f"grad {name}"], **EXACT)


@pytest.mark.parametrize("at", [1, 31, 40])
@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_future_does_not_leak(rule: str, backend: str, at: int) -> None:
    inputs = make_inputs(rule, 2, 66, 1, 6, 3)
    changed = {n: x.clone() for n, x in inputs.items()}
    for name in set(inputs) - {"state"}:
        changed[name][:, at:] = 1 - 2 * changed[name][:, at:]
    (o, _), (changed_o, _) = (call(rule, x, backend=backend) for x in (inputs, changed))
    assert o is not None
    assert changed_o is not None
    # what is masked out is multiplied by an exact 0
    torch.testing.assert_close(o[:, :at], changed_o[:, :at], rtol=0, atol=0)
    assert not torch.allclose(o[:, at:], changed_o[:, at:])
    read = leaves(inputs)
    early, _ = call(rule, read, backend=backend)
    assert early is not None
    timed = [x for n, x in read.items() if n != "state"]
    for gradient in torch.autograd.grad(early[:, :at].sum(), timed):
        assert not gradient[:, at:].any()


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_inputs_are_not_modified(rule: str, backend: str) -> None:
    inputs = leaves(make_inputs(rule, 2, 35, 2, 6, 3))
    before = {n: x.detach().clone() for n, x in inputs.items()}
    versions = {n: x._version for n, x in inputs.items()}
    o, state = call(rule, inputs, backend=backend)
    weighted([o, state]).backward()
    for name, x in inputs.items():
        torch.testing.assert_close(x.detach(), before[name], rtol=0, atol=0)
        assert x._version == versions[name], name


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_backward_runs_twice_with_retain_graph(rule: str, backend: str) -> None:
    inputs = leaves(make_inputs(rule, 2, 35, 2, 6, 3))
    loss = weighted(list(call(rule, inputs, backend=backend)))
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(inputs.values()))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_gradients_of_the_state_alone_and_of_the_outputs_alone_exist(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 1, 5, 1, 4, 3)
    for which in (0, 1):
        ours, theirs = leaves(inputs), leaves(inputs)
        for x, name in ((ours, backend), (theirs, "reference")):
            weighted([call(rule, x, backend=name)[which]]).backward()
        for n in set(inputs) - {"q"}:
            torch.testing.assert_close(ours[n].grad, theirs[n].grad, **EXACT)


@pytest.mark.parametrize("keys", ["unit", "sum-normalised elu"])
@pytest.mark.parametrize("steps", [33, 130])
@pytest.mark.parametrize(("rule", "backend"), [case for case in FAST if case[1] != "auto"])
def test_float32_error_is_at_most_twice_that_of_the_reference(rule: str, backend: str, steps: int, keys: str) -> None:
    inputs = make_inputs(rule, 4, steps, 2, 40, 24)
    if keys == "unit":
        inputs["q"], inputs["k"] = normalize(inputs["q"], dim=-1), normalize(inputs["k"], dim=-1)
    else:
        for name in ("q", "k"):
            phi = elu(inputs[name] * 6) + 1
            inputs[name] = phi / phi.sum(-1, keepdim=True)
    inputs = {name: x.float() for name, x in inputs.items()}
    truth = results_and_gradients(rule, {n: x.double() for n, x in inputs.items()}, backend="reference")
    ours, plain = (results_and_gradients(rule, inputs, backend=name) for name in (backend, "reference"))
    for name, true in truth.items():
        error, allowed = ((x[name].double() - true).norm() for x in (ours, plain))
        assert ours[name].dtype == torch.float32
        assert error <= 2 * allowed, f"{name}: error {error:.2e}, reference {allowed:.2e}"


HALF = [torch.bfloat16, torch.float16]


def outputs_and_gradients_for(
    rule: str, inputs: dict[str, Tensor], upstream: tuple[Tensor, Tensor], backend: str
) -> dict[str, Tensor]:
    """Like results_and_gradients, for upstream gradients that the caller has rounded."""
    inputs = leaves(inputs)
    o, state = call(rule, inputs, backend=backend)
    assert o is not None
    towards = [g.to(x.dtype) for g, x in zip(upstream, (o, state), strict=True)]
    gradients = torch.autograd.grad([o, state], list(inputs.values()), towards)
    return {"o": o, "last state": state, **{f"grad {n}": g for n, g in zip(inputs, gradients, strict=True)}}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_half_precision_is_rounded_once_and_keeps_a_float32_state(rule: str, backend: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(rule, 2, 35, 2, 6, 4, dtype=dtype)
    if reason := ops.why_not(backend, rule, inputs["k"]):
        pytest.skip(reason)
    upstream = (torch.randn(2, 35, 2, 4).to(dtype), torch.randn(2, 2, 6, 4))
    ours = outputs_and_gradients_for(rule, {**inputs, "state": inputs["state"].float()}, upstream, backend)
    exact = outputs_and_gradients_for(rule, {n: x.double() for n, x in inputs.items()}, upstream, "reference")
    for name, expected in exact.items():
        wide = "state" in name
        assert ours[name].dtype == (torch.float32 if wide else dtype), name
        # one rounding to the nearest number with 8 or 11 bits, and float32 sums of a few hundred terms of order 1
        rounding = 0 if wide else torch.finfo(dtype).eps
        torch.testing.assert_close(ours[name].double(), expected, rtol=rounding + 1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_splitting_half_precision_loses_nothing_in_the_state(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 1, 40, 2, 6, 3, dtype=torch.bfloat16)
    del inputs["state"]
    if reason := ops.why_not(backend, rule, inputs["k"]):
        pytest.skip(reason)
    _, whole = call(rule, inputs, backend=backend)
    _, middle = call(rule, {n: x[:, :7] for n, x in inputs.items()}, backend=backend)
    _, last = call(rule, {**{n: x[:, 7:] for n, x in inputs.items()}, "state": middle}, backend=backend)
    # float32 sums in another order
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_state_in_half_precision_is_accepted_and_gets_its_gradient(dtype: torch.dtype) -> None:
    inputs = leaves(make_inputs("delta", 1, 20, 1, 5, 3, dtype=dtype))
    o, last = call("delta", inputs, backend="chunked")
    weighted([o, last]).backward()
    assert last.dtype == torch.float32
    assert inputs["state"].grad is not None
    assert inputs["state"].grad.dtype == dtype


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_chunked_computes_alike_under_autocast(rule: str) -> None:
    inputs = make_inputs(rule, 2, 35, 2, 6, 4, dtype=torch.float32)
    plain = results_and_gradients(rule, inputs, backend="chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = results_and_gradients(rule, inputs, backend="chunked")
    assert_same(under, plain, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["sum", "delta"])
@pytest.mark.parametrize("segment", [1, 200, 2**26], ids=["one chunk", "a few chunks", "all chunks"])
def test_the_size_of_a_segment_changes_nothing(rule: str, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(rule, 1, 130, 2, 7, 5)
    expected = results_and_gradients(rule, inputs, backend="reference")
    monkeypatch.setattr(chunked, "SEGMENT_ON_CPU", segment)
    assert_same(results_and_gradients(rule, inputs, backend="chunked"), expected, **EXACT)


@pytest.mark.parametrize("sizes", [(5, 3), (64, 64), (96, 16), (130, 130)], ids=str)
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_every_chunk_size_and_every_remainder_equal_the_reference(rule: str, sizes: tuple[int, int]) -> None:
    size = chunked.chunk_size(*sizes)
    for steps in (size - 1, size, size + 1, 2 * size + size // 2, 2 * size + 17):
        inputs = make_inputs(rule, 1, steps, 2, *sizes)
        ours, theirs = (results_and_gradients(rule, inputs, backend=name) for name in ("chunked", "reference"))
        assert_same(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_chunk_grows_with_the_memory_so_that_kept_states_stay_near_the_inputs() -> None:
    assert [chunked.chunk_size(*x) for x in [(16, 16), (32, 32), (96, 16), (64, 64), (128, 128)]] == [
        16,
        16,
        16,
        32,
        64,
    ]


def test_keys_that_are_all_alike_are_inverted_without_loss() -> None:
    # |I + A|^{-1} has entries of order 1 here while powers of A grow like binomials: a series would lose all digits
    k = torch.full((1, 128, 1, 64), 1 / 8.0)
    inputs = {"q": k, "k": k, "v": torch.randn(1, 128, 1, 64, generator=torch.Generator().manual_seed(0))}
    inputs |= {"beta": torch.ones(1, 128, 1), "state": torch.zeros(1, 1, 64, 64)}
    ours = results_and_gradients("delta", inputs, backend="chunked")
    exact = results_and_gradients("delta", {n: x.double() for n, x in inputs.items()}, backend="reference")
    # each value replaces the one before: only rounding of single steps remains
    torch.testing.assert_close(ours["o"].double(), exact["o"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["sum", "delta"])
@pytest.mark.parametrize("power", [1, 2], ids=["upstream without a graph", "upstream with a graph"])
def test_chunked_refuses_a_second_derivative(rule: str, power: int) -> None:
    inputs = leaves(make_inputs(rule, 1, 20, 1, 4, 3))
    o, _ = call(rule, inputs, backend="chunked")
    with pytest.raises(RuntimeError, match=r"second derivatives of a memory, which only backend 'reference' has"):
        torch.autograd.grad((o**power).sum(), [inputs["k"]], create_graph=True)
    o, _ = call(rule, inputs, backend="reference")
    (gradient,) = torch.autograd.grad((o**power).sum(), [inputs["k"]], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), [inputs["v"]])[0].any()


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_chunked_compiles_as_one_graph(rule: str) -> None:
    inputs = make_inputs(rule, 1, 20, 2, 4, 3)

    def loss(*x: Tensor) -> Tensor:
        return weighted(list(call(rule, dict(zip(inputs, x, strict=True)), backend="chunked")))

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = list(leaves(inputs).values())
        return torch.autograd.grad(function(*x), x)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_a_graph_that_is_not_needed_keeps_nothing(rule: str) -> None:
    inputs = leaves(make_inputs(rule, 1, 40, 1, 4, 3))
    expected = call(rule, inputs, backend="chunked")
    with torch.no_grad():
        o, state = call(rule, inputs, backend="chunked")
    assert not state.requires_grad
    torch.testing.assert_close(o, expected[0], rtol=0, atol=0)
    frozen = {n: x if n == "v" else x.detach() for n, x in inputs.items()}
    o, state = call(rule, frozen, backend="chunked")
    reference, _ = call(rule, frozen, backend="reference")
    ours, theirs = (torch.autograd.grad(weighted([x]), [inputs["v"]])[0] for x in (o, reference))
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_memory_kept_for_backward_grows_with_steps_not_with_states(rule: str) -> None:
    # the plain loop keeps K V numbers a step, here 4096
    steps, n_features, d_value = 512, 64, 64
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    inputs = leaves(make_inputs(rule, 1, steps, 1, n_features, d_value, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(rule, inputs, backend="chunked")
    size = chunked.chunk_size(n_features, d_value)
    per_step = 2 * n_features + 2 * d_value + 1 + 3 * size + 2 * n_features * d_value / size
    assert sum(kept.values()) <= steps * per_step


# --- what the rules mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ops.backends_of("delta", SMALL))
def test_delta_with_orthogonal_keys_retrieves_exactly_and_overwrites_only_what_it_is_told(backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    keys = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    order = torch.tensor([0, 1, 2, 3, 4, 5, 2, 0])
    k = keys[order][None, :, None]
    v = torch.randn(1, 8, 1, 4, generator=g, dtype=torch.float64)
    _, state = ops.delta_rule(None, k, v, torch.ones(1, 8, 1, dtype=torch.float64), backend=backend)
    retrieved = keys @ state[0, 0]
    # the last position at which each key was written
    for key, position in {0: 7, 1: 1, 2: 6, 3: 3, 4: 4, 5: 5}.items():
        torch.testing.assert_close(retrieved[key], v[0, position, 0], **EXACT)


def test_the_sum_rule_mixes_what_was_overwritten_where_delta_does_not() -> None:
    k = torch.eye(3, dtype=torch.float64)[[0, 0]][None, :, None]
    v = torch.tensor([1.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    assert float(ops.sum_rule(None, k, v)[1][0, 0, 0, 0]) == pytest.approx(6.0)
    assert float(ops.delta_rule(None, k, v, torch.ones(1, 2, 1).double())[1][0, 0, 0, 0]) == pytest.approx(5.0)


def test_beta_interpolates_between_the_old_and_the_new_value() -> None:
    k = torch.eye(2, dtype=torch.float64)[[1, 1]][None, :, None]
    v = torch.tensor([2.0, 10.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.tensor([1.0, 0.25], dtype=torch.float64).view(1, 2, 1)
    # 0.25 * 10 + 0.75 * 2
    assert float(ops.delta_rule(None, k, v, beta)[1][0, 0, 1, 0]) == pytest.approx(4.0)


@pytest.mark.parametrize("normalised", [True, False], ids=["sum-normalised", "raw"])
def test_delta_is_a_contraction_exactly_when_keys_are_sum_normalised(normalised: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 1, 16, generator=g, dtype=torch.float64)
    k = elu(x) + 1
    k = k / k.sum(-1, keepdim=True) if normalised else k
    v = torch.randn(1, 20, 1, 3, generator=g, dtype=torch.float64)
    beta = torch.full((1, 20, 1), 0.5, dtype=torch.float64)
    a, b = (torch.randn(1, 1, 16, 3, generator=g, dtype=torch.float64) for _ in range(2))
    distances = [float((a - b).norm())]
    for t in range(20):
        step = slice(t, t + 1)
        a, b = (ops.delta_rule(None, k[:, step], v[:, step], beta[:, step], W)[1] for W in (a, b))
        distances.append(float((a - b).norm()))
    if normalised:
        assert all(later <= earlier for earlier, later in itertools.pairwise(distances))
    else:
        # SPEC A.12: |k|^2 is about 31 for ELU+1 features of size 16, so the memory blows up
        assert distances[-1] > 1e6 * distances[0]


def test_fwm_keeps_the_norm_at_most_one_except_after_the_first_write() -> None:
    inputs: dict[str, Any] = make_inputs("fwm", 2, 6, 2, 5, 3)
    inputs["v"] = inputs["v"] * 10
    inputs["state"] = None
    for steps in (1, 2, 6):
        norm = call("fwm", {n: x if x is None else x[:, :steps] for n, x in inputs.items()})[1].flatten(2).norm(dim=-1)
        if steps == 1:
            assert bool((norm > 1).all())
        else:
            assert bool((norm <= 1 + 1e-12).all())


# --- attention weights and kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_attention_weights_give_what_the_last_memory_gives(rule: str, steps: int, n_queries: int) -> None:
    inputs = make_inputs(rule, 2, steps, 2, 13, 5)
    del inputs["state"]
    inputs["q"] = torch.randn(2, n_queries, 2, 13, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def by_memory(x: dict[str, Tensor]) -> Tensor:
        _, W = call(rule, {**x, "q": None}, backend="reference")
        return torch.einsum("bnhk,bhkv->bnhv", x["q"], W)

    def by_weights(x: dict[str, Tensor]) -> Tensor:
        a = ops.attention_weights(x["q"], x["k"], x.get("beta"))
        assert a.shape == (2, 2, n_queries, steps)
        return torch.einsum("bhnt,bthv->bnhv", a, x["v"])

    results = []
    for function in (by_memory, by_weights):
        x = leaves(inputs)
        o = function(x)
        results.append([o, *torch.autograd.grad(weighted([o]), list(x.values()))])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("steps", [33, 130])
def test_float32_error_of_delta_weights_is_at_most_twice_that_of_the_recurrence(steps: int) -> None:
    inputs = make_inputs("delta", 4, steps, 2, 40, 24)
    q, k, v, beta = (inputs[n].float() for n in ("q", "k", "v", "beta"))
    q, k = q[:, :3], normalize(k, dim=-1)

    def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return torch.einsum("bnhk,bhkv->bnhv", q, ops.delta_rule(None, k, v, beta, backend="reference")[1])

    truth = plain(q.double(), k.double(), v.double(), beta.double())
    ours = torch.einsum("bhnt,bthv->bnhv", ops.attention_weights(q, k, beta), v)
    error, allowed = ((o.double() - truth).norm() for o in (ours, plain(q, k, v, beta)))
    assert error <= 2 * allowed, f"error {error:.2e}, recurrence {allowed:.2e}"


def test_attention_weights_of_an_empty_batch() -> None:
    q, k, beta = torch.zeros(0, 2, 1, 5), torch.zeros(0, 7, 1, 5), torch.zeros(0, 7, 1)
    assert ops.attention_weights(q, k).shape == (0, 1, 2, 7)
    assert ops.attention_weights(q, k, beta).shape == (0, 1, 2, 7)


@pytest.mark.parametrize("steps", [3, 34])
def test_delta_weight_gradients_are_those_of_finite_differences(steps: int) -> None:
    inputs = leaves(make_inputs("delta", 2, steps, 1, 3, 1))
    q = inputs["q"].detach()[:, :2].clone().requires_grad_()
    assert gradcheck(ops.attention_weights, (q, inputs["k"], inputs["beta"]))


def test_sum_weight_gradients_are_those_of_finite_differences() -> None:
    inputs = leaves(make_inputs("sum", 2, 4, 2, 3, 1))
    assert gradcheck(ops.attention_weights, (inputs["q"], inputs["k"]))


def test_delta_weights_backward_runs_twice_and_modifies_nothing() -> None:
    inputs = leaves(make_inputs("delta", 2, 35, 2, 6, 1))
    arguments = [inputs[n] for n in ("q", "k", "beta")]
    before = [x.detach().clone() for x in arguments]
    loss = weighted([ops.attention_weights(*arguments)])
    first = torch.autograd.grad(loss, arguments, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for x, old in zip(arguments, before, strict=True):
        torch.testing.assert_close(x.detach(), old, rtol=0, atol=0)


def explicit_dpfp(x: Tensor, nu: int) -> Tensor:
    u = torch.cat([torch.relu(x), torch.relu(-x)], -1)
    size = u.shape[-1]
    return torch.stack([u[..., i] * u[..., (i + j) % size] for j in range(1, nu + 1) for i in range(size)], -1)


@pytest.mark.parametrize(("size", "nu"), [(2, 1), (5, 1), (5, 2), (5, 4), (8, 7)])
def test_dpfp_kernel_is_the_dot_product_of_the_features(size: int, nu: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, size, generator=g, dtype=torch.float64)
    k = torch.randn(3, 9, 2, size, generator=g, dtype=torch.float64)
    q[0, 0, 0], k[0, 0, 0, 1] = 0.0, 0.0
    expected = torch.einsum("bthf,bhf->bht", explicit_dpfp(k, nu), explicit_dpfp(q, nu))
    torch.testing.assert_close(ops.dpfp_kernel(q, k, nu), expected, **EXACT)


@pytest.mark.parametrize("nu", [1, 3])
def test_dpfp_kernel_gradients_are_those_of_finite_differences(nu: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 4, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 5, 1, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda q, k: ops.dpfp_kernel(q, k, nu), (q, k))


@pytest.mark.parametrize("offset", ["number", "tensor"])
def test_exponential_kernel_is_the_dot_product_of_the_features_and_so_is_its_gradient(offset: str) -> None:
    g = torch.Generator().manual_seed(0)
    phi_q = torch.rand(2, 1, 6, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    R = torch.randn(6, 4, generator=g, dtype=torch.float64)
    shift: Any = 0.3 if offset == "number" else torch.rand(2, 1, 1, 1, generator=g, dtype=torch.float64)
    phi_x = torch.exp(x @ R.T - x.square().sum(-1, keepdim=True) / 2 - shift) + 0.01
    expected = torch.einsum("bhte,bhe->bht", phi_x, phi_q)
    torch.testing.assert_close(ops.exponential_kernel(phi_q, x, R, shift, 0.01), expected, **EXACT)
    assert gradcheck(lambda p, x: ops.exponential_kernel(p, x, R, shift, 0.01), (phi_q, x))


def test_flushing_exp_is_exp_but_zero_at_the_edge_of_underflow() -> None:
    x = torch.tensor([-200.0, -88.0, -86.0, -1.0, 0.0, 3.0, 80.0])
    y = ops.flushing_exp(x)
    assert y[0] == 0
    assert y[1] == 0
    torch.testing.assert_close(y[2:], torch.exp(x[2:]), rtol=1e-6, atol=0)
    assert gradcheck(ops.flushing_exp, torch.linspace(-20, 2, 7, dtype=torch.float64, requires_grad=True))


def test_flushing_exp_hides_no_nan_and_no_overflow() -> None:
    y = ops.flushing_exp(torch.tensor([math.nan, 1000.0]))
    assert math.isnan(y[0])
    assert math.isinf(y[1])


# --- refusals ---------------------------------------------------------------------------------------------------------

WRONG = {
    "q with other features": ("q", lambda x: x[..., :-1], r"q has shape \(2, 4, 3, 4\)"),
    "q with fewer steps": ("q", lambda x: x[:, :-1], r"q has shape \(2, 3, 3, 5\)"),
    "k without heads": ("k", lambda x: x[:, :, 0], r"k has shape \(2, 4, 5\)"),
    "v without heads": ("v", lambda x: x[:, :, 0], r"v has shape \(2, 4, 6\)"),
    "v of another batch": ("v", lambda x: x[:1], r"v has shape \(1, 4, 3, 6\)"),
    "beta with a last dimension": ("beta", lambda x: x.unsqueeze(-1), r"beta has shape \(2, 4, 3, 1\)"),
    "state of another size": ("state", lambda x: x.mT, r"state has shape \(2, 3, 6, 5\)"),
    "state for one head": ("state", lambda x: x[:, :1], r"state has shape \(2, 1, 5, 6\)"),
    "q of another dtype": ("q", lambda x: x.float(), r"q is torch\.float32"),
    "v of another dtype": ("v", lambda x: x.long(), r"v is torch\.int64"),
    "state of another dtype": ("state", lambda x: x.half(), r"state is torch\.float16"),
    "q on another device": ("q", lambda x: x.to("meta"), r"q is on meta"),
    "beta on another device": ("beta", lambda x: x.to("meta"), r"beta is on meta"),
    "state on another device": ("state", lambda x: x.to("meta"), r"state is on meta"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("rule", RULES)
def test_what_does_not_fit_is_named_with_its_value(rule: str, what: str) -> None:
    name, spoil, message = WRONG[what]
    inputs = make_inputs(rule, 2, 4, 3, 5, 6)
    if name not in inputs:
        assert rule == "sum"
        assert name == "beta"
        return
    inputs[name] = spoil(inputs[name])
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        call(rule, inputs)


@pytest.mark.parametrize("what", [what for what in WRONG if what.startswith("q ") and what != "q with fewer steps"])
def test_a_query_that_does_not_fit_is_refused_without_causality_too(what: str) -> None:
    _, spoil, message = WRONG[what]
    inputs = make_inputs("sum", 2, 4, 3, 5, 6)
    with pytest.raises(ValueError, match=f"^{message}"):
        call("sum", {**inputs, "q": spoil(inputs["q"])}, causal=False)


def test_integers_are_refused() -> None:
    k = torch.ones(1, 2, 1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^k is torch\.int64"):
        ops.sum_rule(None, k, k)


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    inputs = make_inputs("sum", 1, 2, 1, 3, 2)
    with pytest.raises(ValueError, match=r"unknown backend 'chunkd'\. Did you mean 'chunked'\? Known: .*reference"):
        call("sum", inputs, backend="chunkd")


@pytest.mark.parametrize(("rule", "backend"), [("fwm", "chunked"), ("sum", "scan"), ("delta", "scan")])
def test_a_backend_is_used_or_refused_but_never_swapped(rule: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{backend}' does not compute the rule '{rule}'; choose one of"):
        call(rule, make_inputs(rule, 1, 2, 1, 3, 2), backend=backend)
    reason = ops.why_not(backend, rule)
    assert reason
    assert backend not in ops.backends_of(rule)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_every_backend_that_says_it_can_can(rule: str, backend: str) -> None:
    assert ops.why_not(backend, rule) is None


NO_TENSORS = {
    "q that is a list": ("q", lambda x: x.tolist(), "q is list; expected a torch.Tensor"),
    "k that is None": ("k", lambda x: None, "k is None; expected a torch.Tensor"),
    "v that is an array": ("v", lambda x: x.numpy(), "v is ndarray; expected a torch.Tensor"),
    "beta that is forgotten": ("beta", lambda x: None, "beta is None; expected a torch.Tensor"),
    "k that is sparse": ("k", lambda x: x.to_sparse(), r"k is torch\.sparse_coo; the rules need a dense tensor"),
}


@pytest.mark.parametrize("what", NO_TENSORS)
@pytest.mark.parametrize("rule", ["delta", "fwm"])
def test_what_is_no_dense_tensor_is_named(rule: str, what: str) -> None:
    name, spoil, message = NO_TENSORS[what]
    inputs: dict[str, Any] = make_inputs(rule, 2, 4, 3, 5, 6)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(rule, {**inputs, name: spoil(inputs[name])})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool], ids=str)
def test_a_dtype_without_arithmetic_is_refused(dtype: torch.dtype) -> None:
    k = torch.zeros(1, 2, 1, 3).to(dtype)
    with pytest.raises(ValueError, match=f"^k is {dtype}; the rules take .* float32, float64, bfloat16, float16$"):
        ops.sum_rule(k, k, k)


@pytest.mark.parametrize("backend", [None, 3], ids=str)
def test_a_backend_that_is_no_name_is_answered_with_the_known_ones(backend: Any) -> None:
    with pytest.raises(ValueError, match=f"unknown backend {backend}. Known: .*reference"):
        call("sum", make_inputs("sum", 1, 2, 1, 3, 2), backend=backend)


READ_WRONGLY = {
    "q": (lambda x: x[..., :-1], r"q has shape \(2, 3, 2, 4\); k \(2, 7, 2, 5\) asks for \(2, 3, 2, 5\)"),
    "k": (lambda x: x[0], r"k has shape \(7, 2, 5\); expected 4 dimensions"),
    "beta": (lambda x: x[:, 1:], r"beta has shape \(2, 6, 2\)"),
}


@pytest.mark.parametrize("name", READ_WRONGLY)
def test_attention_weights_refuse_what_does_not_fit(name: str) -> None:
    spoil, message = READ_WRONGLY[name]
    inputs = {"q": torch.rand(2, 3, 2, 5), "k": torch.rand(2, 7, 2, 5), "beta": torch.rand(2, 7, 2)}
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.attention_weights(**{**inputs, name: spoil(inputs[name])})
    for other, message in (("meta", "is on meta but k is on cpu"), (torch.float64, r"is torch\.float64 but k is")):
        if name != "k":
            with pytest.raises(ValueError, match=f"^{name} {message}"):
                ops.attention_weights(**{**inputs, name: inputs[name].to(other)})  # type: ignore[call-overload]


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_attention_weights_of_no_writes_and_of_no_queries(rule: str) -> None:
    for n, t in ((0, 40), (3, 0), (0, 0)):
        x = [torch.rand(2, n, 2, 5), torch.rand(2, t, 2, 5)] + ([torch.rand(2, t, 2)] if rule == "delta" else [])
        arguments = [y.requires_grad_() for y in x]
        weights = ops.attention_weights(*arguments)
        assert weights.shape == (2, 2, n, t)
        for gradient in torch.autograd.grad(weights.sum(), arguments, materialize_grads=True):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_attention_weights_in_half_precision_are_rounded_once(rule: str, dtype: torch.dtype) -> None:
    inputs = {n: x.to(dtype) for n, x in make_inputs(rule, 2, 35, 2, 6, 1).items() if n in ("q", "k", "beta")}
    weights = []
    for x in (inputs, {n: y.double() for n, y in inputs.items()}):
        x = leaves(x)
        a = ops.attention_weights(**x)
        g = torch.autograd.grad(a, list(x.values()), torch.ones_like(a))
        weights.append([a, *g])
    for ours, exact in zip(*weights, strict=True):
        assert ours.dtype == dtype
        # one rounding, and float32 sums of a few dozen terms of order 1
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_attention_weights_keep_vectors_not_memories() -> None:
    """O(T K) for each query, and nothing of T T; a chunk's triangles are 3 C a step."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    steps, n_features = 2048, 64
    q, k, beta = torch.rand(1, 1, 1, n_features), torch.rand(1, steps, 1, n_features), torch.rand(1, steps, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.attention_weights(*(x.requires_grad_() for x in (q, k / n_features, beta)))
    assert sum(kept.values()) <= steps * (2 * n_features + 3 * 32)


# --- autocast, views, sizes of zero -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_autocast_narrows_nothing(rule: str, backend: str) -> None:
    inputs = make_inputs(rule, 2, 35, 2, 6, 4, dtype=torch.float32)
    plain = call(rule, inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = call(rule, inputs, backend=backend)
    for ours, theirs in zip(under, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_autocast_narrows_no_attention_weights_and_no_gradient_of_them(rule: str) -> None:
    inputs = {
        n: x for n, x in make_inputs(rule, 2, 35, 2, 6, 1, dtype=torch.float32).items() if n in ("q", "k", "beta")
    }
    expected = ops.attention_weights(**inputs)
    x = leaves(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = ops.attention_weights(**x)
        gradients = torch.autograd.grad(weights.sum(), list(x.values())) if rule == "delta" else ()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    x = leaves(inputs)
    if gradients:
        for ours, theirs in zip(
            gradients, torch.autograd.grad(ops.attention_weights(**x).sum(), list(x.values())), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_a_view_that_is_negated_lazily_is_negated(rule: str, backend: str) -> None:
    """`x.conj().imag` shares memory with x and has a bit that says so: a raw pointer would miss the sign."""
    inputs = make_inputs(rule, 2, 9, 2, 6, 4)
    lazy = {n: torch._neg_view(x) for n, x in inputs.items()}
    assert all(x.is_neg() and x.is_contiguous() for x in lazy.values())
    for ours, theirs in zip(
        call(rule, lazy, backend=backend), call(rule, {n: -x for n, x in inputs.items()}, backend=backend), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0), (0, 0)], ids=["no features", "no values", "neither"])
@pytest.mark.parametrize(("rule", "backend"), CASES)
def test_memories_without_a_row_or_a_column_are_empty(rule: str, backend: str, sizes: tuple[int, int]) -> None:
    inputs = leaves(make_inputs(rule, 2, 4, 3, *sizes) if sizes[0] else without_features(rule, sizes[1]))
    o, state = call(rule, inputs, backend=backend)
    assert o is not None
    assert o.shape == (2, 4, 3, sizes[1])
    assert state.shape == (2, 3, *sizes)
    assert not o.any()
    for gradient in torch.autograd.grad(o.sum() + state.sum(), list(inputs.values()), materialize_grads=True):
        assert not gradient.any()


def without_features(rule: str, d_value: int) -> dict[str, Tensor]:
    inputs = make_inputs(rule, 2, 4, 3, 1, d_value)
    return {n: x[..., :0] if n in ("q", "k") else x[:, :, :0] if n == "state" else x for n, x in inputs.items()}


@pytest.mark.parametrize("name", ["fwm cpu", "fwm scan", "attention weights", "DPFP kernel", "exponential kernel"])
def test_a_second_derivative_is_refused_not_lost(name: str) -> None:
    inputs = leaves(make_inputs("delta", 1, 5, 1, 4, 3))
    q, k, v, beta, _ = (inputs[n] for n in NAMES)
    functions: dict[str, Callable[[], Any]] = {
        "fwm cpu": lambda: ops.fwm_rule(q, k, v, beta, backend="cpu")[0],
        "fwm scan": lambda: ops.fwm_rule(q, k, v, beta, backend="scan")[0],
        "attention weights": lambda: ops.attention_weights(q, k, beta),
        "DPFP kernel": lambda: ops.dpfp_kernel(q[:, 0], k, 1),
        "exponential kernel": lambda: ops.exponential_kernel(q[:, 0], k.transpose(1, 2), torch.eye(4).double(), 0.0, 0),
    }
    if name == "fwm cpu" and (reason := ops.why_not("cpu", "fwm", k)):
        pytest.skip(reason)
    # the gradient of a sum has no graph of its own
    loss = functions[name]().sum()
    with pytest.raises(RuntimeError, match="second derivatives of a memory"):
        torch.autograd.grad(loss, [k], create_graph=True)


@pytest.mark.parametrize("rule", RULES)
def test_shapes_are_known_on_the_meta_device(rule: str) -> None:
    inputs = {n: x.to("meta") for n, x in make_inputs(rule, 2, 35, 2, 6, 4).items()}
    o, state = call(rule, inputs)
    assert o is not None
    assert o.shape == (2, 35, 2, 4)
    assert state.shape == (2, 2, 6, 4)
    assert o.device.type == state.device.type == "meta"
