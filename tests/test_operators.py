"""Compiled rules within tracers: registered as they are, one graph for all sizes, and the numbers of the short way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig, build_attention
from fwp_lightning.ops import fwm_recurrence, recurrence

pytestmark = pytest.mark.skipif(
    compiled.why_unavailable(fwm_recurrence.KERNEL) is not None,
    reason="kernels cannot be built here (tests/test_compiled.py tests that the reason is said)",
)

Rule = Callable[..., tuple[Tensor | None, Tensor]]
Inputs = dict[str, Tensor | None]

RULES: dict[str, Rule] = {
    "sum": lambda q, k, v, beta, state: recurrence.sum_rule(q, k, v, state),
    "delta": recurrence.delta_rule,
    "fwm": fwm_recurrence.fwm_rule,
}
ABSENT = [(), ("q",), ("state",), ("q", "state")]
ALL_OR_LEAST = [(), ("q", "state")]
# B, T, H, K, V: the second and third are what a graph for any size must hold for as well
SIZES = [(2, 13, 3, 5, 4), (4, 20, 3, 5, 4), (5, 97, 3, 5, 4)]


def draw(
    size: tuple[int, ...],
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Inputs by name, those that are there as leaves."""
    b, t, h, n_features, d_value = size
    g = torch.Generator().manual_seed(t)
    shapes = {"q": (b, t, h, n_features), "k": (b, t, h, n_features), "v": (b, t, h, d_value), "beta": (b, t, h)}
    x = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()}
    x["k"] /= math.sqrt(n_features)
    x["beta"] = x["beta"].sigmoid()
    x["state"] = torch.randn(b, h, n_features, d_value, generator=g, dtype=torch.float64)
    wide = {name: torch.promote_types(dtype, torch.float32) if name == "state" else dtype for name in x}
    return {n: None if n in absent else y.to(device, wide[n]).requires_grad_() for n, y in x.items()}


def results(rule: Rule, inputs: Inputs, wanted: tuple[str, ...] = ("o", "last")) -> dict[str, Tensor]:
    """Outputs, last state and the gradients of those wanted."""
    found = {n: x for n, x in zip(("o", "last"), rule(**inputs), strict=True) if x is not None and x.numel()}
    leaves = {n: x for n, x in inputs.items() if x is not None}
    loss = sum(
        (x.double() * torch.sin(torch.arange(x.numel(), device=x.device)).view_as(x)).sum()
        for n, x in found.items()
        if n in wanted
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)  # type: ignore[arg-type]
    return found | {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}


def assert_traced_alike(rule: Rule, backend: str, cases: list[Inputs]) -> None:
    """One graph for any size gives the bits of the short way, with all gradients."""
    torch._dynamo.reset()
    traced = torch.compile(rule, backend=backend, fullgraph=True, dynamic=True)
    for inputs in cases:
        ours, theirs = results(traced, inputs), results(rule, inputs)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            # the same kernel on the same numbers
            torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("absent", ABSENT, ids=lambda x: "no " + " and ".join(x))
def test_the_fwm_operator_is_what_its_registration_says(absent: tuple[str, ...]) -> None:
    # T = 37: what is kept is rounded up, and the rest of it must not be chance
    inputs = draw((2, 37, 2, 4, 3), absent)
    torch.library.opcheck(torch.ops.fwp_lightning.fwm_recurrence.default, tuple(inputs.values()))


@pytest.mark.parametrize("rule", RULES)
def test_the_layout_of_inputs_is_not_that_of_results(rule: str) -> None:
    inputs = draw((2, 7, 3, 5, 4), ("beta",) if rule == "sum" else ())
    strided = {n: None if x is None else x.detach().mT.contiguous().mT.requires_grad_() for n, x in inputs.items()}
    assert strided["v"] is not None
    assert not strided["v"].is_contiguous()
    operator = (fwm_recurrence if rule == "fwm" else recurrence).RULE.operator
    options = () if rule == "fwm" else (None, ops.FusedMemory().flags(), ops.FusedMemory().eps())
    torch.library.opcheck(operator, (*strided.values(), *options))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("absent", ALL_OR_LEAST, ids=lambda x: "no " + " and ".join(x))
@pytest.mark.parametrize("rule", RULES)
def test_one_graph_of_any_size_gives_the_same_bits(rule: str, absent: tuple[str, ...], compiler: str) -> None:
    absent = (*absent, "beta") if rule == "sum" else absent
    assert_traced_alike(RULES[rule], compiler, [draw(size, absent) for size in SIZES])


@pytest.mark.parametrize("wanted", ["o", "last"])
@pytest.mark.parametrize("rule", RULES)
def test_a_result_without_a_gradient_counts_as_zero(rule: str, wanted: str) -> None:
    inputs = draw(SIZES[1], ("beta",) if rule == "sum" else ())
    references = {"sum": ops.sum_rule, "delta": ops.delta_rule, "fwm": ops.fwm_rule}

    def reference(**inputs: Tensor | None) -> tuple[Tensor | None, Tensor]:
        given = {n: x for n, x in inputs.items() if n != "beta" or rule != "sum"}
        return references[rule](**given, backend="reference")  # type: ignore[arg-type]

    ours, theirs = (results(f, inputs, (wanted,)) for f in (RULES[rule], reference))
    for name, expected in theirs.items():
        # float64 sums of a few dozen terms
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_a_second_derivative_of_a_graph_is_refused_too(rule: str) -> None:
    torch._dynamo.reset()
    inputs = draw(SIZES[0], ("beta",) if rule == "sum" else ())
    o, _ = torch.compile(RULES[rule], backend="eager", fullgraph=True)(**inputs)
    with pytest.raises(RuntimeError, match="second derivatives of a memory"):
        torch.autograd.grad(o.sum(), [inputs["k"]], create_graph=True)


def test_what_a_tracer_is_told_is_kept_holds_what_the_fwm_kernel_keeps() -> None:
    for t in (0, 1, 16, 31, 32, 33, 64, 200):
        for n_features, d_value in ((1, 1), (4, 3), (64, 200), (16, 1024)):
            x = [torch.empty(3, t, 2, n) for n in (n_features, n_features, d_value, 1)]
            *_, kept = fwm_recurrence._allocate([*x, None], keep=True)
            problem = fwm_recurrence._problem([*x, None])
            assert kept.numel() >= 6 * compiled.count(fwm_recurrence.KERNEL, "kept", torch.float32, problem)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of processes, of this one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "config",
    [AttentionConfig("fwm", "tanh", backend="cpu"), AttentionConfig("delta", "elu", phi_norm="sum", backend="cpu")],
    ids=["fwm", "delta"],
)
def test_data_parallel_training_compiles(one_process: None, config: AttentionConfig) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention = build_attention(config, 8, 2).double()
    parallel = torch.compile(nn.parallel.DistributedDataParallel(attention), backend="aot_eager", dynamic=True)
    for b, t in ((2, 13), (3, 20)):
        x = torch.randn(b, t, 8, dtype=torch.float64)
        found = []
        for module in (parallel, attention):
            attention.zero_grad()
            y, _ = module(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in attention.parameters() if p.grad is not None)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
