"""What every registered rule keeps: all backends compute the reference, its gradients and its states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_cases import (
    EXACT,
    Inputs,
    assert_same,
    backends_of,
    config_of,
    leaves,
    make_inputs,
    memory_of,
    results_and_gradients,
    run,
    some_state,
    steps,
    variants,
    weighted,
)
from torch import Tensor
from torch.autograd import gradcheck

from fwp_lightning.attention import RULES, AttentionConfig, Rule, build_attention

H, D, V = 2, 5, 3


def rule_of(name: str, options: Any, d_key: int = D, d_value: int = V) -> Rule:
    return memory_of(config_of(name, options), d_key, d_value, H).rule


VARIANTS = [(name, options) for name in RULES for options in variants(name) if name != "softmax"]
CASES = [(name, options, backend) for name, options in VARIANTS for backend in backends_of(rule_of(name, options))]
FAST = [case for case in CASES if case[2] != "reference"]


def named(cases: list[Any]) -> Any:
    ids = [" ".join(str(x).replace("Options", "") for x in case if x is not None) for case in cases]
    return pytest.mark.parametrize(("name", "options", "backend")[: len(cases[0])], cases, ids=ids)


@named(VARIANTS)
def test_reference_gradients_are_those_of_finite_differences(name: str, options: Any) -> None:
    rule = rule_of(name, options)
    inputs, state = leaves(make_inputs(rule, 1, 3, H, D, V)), some_state(rule, 1, H, D, V)
    names, n = list(inputs), len(inputs)
    backend = "reference" if "reference" in backends_of(rule) else "auto"

    def outputs(*x: Tensor) -> tuple[Tensor, ...]:
        o, last = run(rule, dict(zip(names, x[:n], strict=True)), x[n:], backend=backend)
        assert o is not None
        return (o, *last)

    assert gradcheck(outputs, (*inputs.values(), *(x.requires_grad_() for x in state)))


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "empty"])
@pytest.mark.parametrize("n_steps", [1, 2, 33, 70])
@named(FAST)
def test_backends_equal_the_reference_in_outputs_state_and_all_gradients(
    name: str, options: Any, backend: str, n_steps: int, with_state: bool
) -> None:
    rule = rule_of(name, options)
    inputs = make_inputs(rule, 2, n_steps, H, D, V, seed=n_steps)
    state = some_state(rule, 2, H, D, V) if with_state else None
    truth = "reference" if "reference" in backends_of(rule) else "auto"
    assert_same(*(results_and_gradients(rule, inputs, state, backend=way) for way in (backend, truth)), **EXACT)


@named(CASES)
def test_splitting_and_passing_the_state_on_changes_no_output_and_no_gradient(
    name: str, options: Any, backend: str
) -> None:
    rule = rule_of(name, options)
    inputs = make_inputs(rule, 2, 40, H, D, V)
    whole = results_and_gradients(rule, inputs, backend=backend)
    for split in (1, 17, 32, 39):
        parts = leaves(inputs)
        first_o, middle = run(rule, steps(rule, parts, 0, split), backend=backend)
        second_o, last = run(rule, steps(rule, parts, split, None), middle, backend=backend)
        assert first_o is not None
        assert second_o is not None
        o = torch.cat([first_o, second_o], 1)
        gradients = torch.autograd.grad(weighted([o, *last]), list(parts.values()))
        found = {"o": o, **{f"last {i}": x for i, x in enumerate(last)}}
        found |= {f"grad {n}": g for n, g in zip(parts, gradients, strict=True)}
        assert_same(found, {n: whole[n] for n in found}, **EXACT)


@pytest.mark.parametrize("at", [1, 31])
@named(CASES)
def test_future_does_not_leak(name: str, options: Any, backend: str, at: int) -> None:
    rule = rule_of(name, options)
    inputs = leaves(make_inputs(rule, 2, 40, H, D, V))
    later = steps(rule, make_inputs(rule, 2, 40, H, D, V, seed=9), at, None)
    changed = {n: torch.cat([x, later[n]], 1) for n, x in steps(rule, inputs, 0, at).items()}
    (o, _), (other, _) = (run(rule, x, backend=backend) for x in (inputs, changed))
    assert o is not None
    assert other is not None
    torch.testing.assert_close(o[:, :at], other[:, :at], **EXACT)
    assert not torch.allclose(o[:, at:], other[:, at:])
    early = torch.autograd.grad(o[:, :at].square().sum(), list(inputs.values()))
    assert not any(gradient.any() for gradient in steps(rule, dict(zip(inputs, early, strict=True)), at, None).values())


def relative_error(ours: Inputs, truth: Inputs) -> dict[str, float]:
    return {n: ((ours[n].double() - truth[n]).norm() / truth[n].norm().clamp(min=1e-30)).item() for n in truth}


@named([case for case in FAST if case[2] != "auto"])
def test_float32_error_is_at_most_twice_that_of_the_reference(name: str, options: Any, backend: str) -> None:
    rule = rule_of(name, options, 16, 16)
    inputs = make_inputs(rule, 2, 70, H, 16, 16)
    truth = results_and_gradients(rule, inputs, backend="reference")
    narrow = {n: x.float() for n, x in inputs.items()}
    rule = rule.float()
    ours, loop = (
        relative_error(results_and_gradients(rule, narrow, backend=way), truth) for way in (backend, "reference")
    )
    # where the loop is exact by luck, one rounding of float32 is granted
    worse = {n: (ours[n], loop[n]) for n in truth if ours[n] > 2 * loop[n] + 1.2e-7}
    assert not worse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@named(CASES)
def test_half_precision_keeps_a_float32_state(name: str, options: Any, backend: str, dtype: torch.dtype) -> None:
    rule = rule_of(name, options).float()
    inputs = make_inputs(rule, 2, 35, H, D, V, dtype=dtype)
    o, state = run(rule, inputs, backend=backend)
    assert o is not None
    assert o.dtype == dtype
    assert all(x.dtype == torch.float32 for x in state)


@pytest.mark.parametrize("sizes", [(0, 7), (2, 0)], ids=["empty batch", "no steps"])
@named(CASES)
def test_what_is_empty_passes(name: str, options: Any, backend: str, sizes: tuple[int, int]) -> None:
    rule = rule_of(name, options)
    b, n_steps = sizes
    state = some_state(rule, b, H, D, V)
    o, last = run(rule, make_inputs(rule, b, n_steps, H, D, V), state, backend=backend)
    assert o is not None
    assert o.shape == (b, n_steps, H, V)
    if not n_steps:
        for ours, before in zip(last, state, strict=True):
            torch.testing.assert_close(ours, before, rtol=0, atol=0)


# --- within a memory --------------------------------------------------------------------------------------------------

WRITES_FIRST = [(name, options) for name, options in VARIANTS if not RULES[name].reads_while_writing]


def gates_of(rule: Rule, inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs[gate.name] for gate in rule.gates)


def with_normaliser(name: str, options: Any) -> list[AttentionConfig]:
    """The rule with each way to normalise its read-out, on features that are positive."""
    rule = RULES[name]
    maps, norms = rule.feature_maps or ("elu",), rule.phi_norms or ("sum",)
    return [
        AttentionConfig(name, maps[0], phi_norm=norms[0], attention_norm=norm, rule_options=options)
        for norm in rule.attention_norms
    ]


@named(WRITES_FIRST)
def test_writing_then_reading_and_the_attention_weights_equal_the_last_output(name: str, options: Any) -> None:
    for config in with_normaliser(name, options):
        memory = memory_of(config, D, V, H)
        inputs = make_inputs(memory.rule, 2, 37, H, D, V)
        q, k, v, gates = inputs["q"], inputs["k"], inputs["v"], gates_of(memory.rule, inputs)
        o, _ = memory(q, k, v, gates)
        torch.testing.assert_close(memory.read(q[:, -1:], memory.write(k, v, gates)), o[:, -1:], **EXACT)
        if memory.has_attention_weights:
            weights = memory.attention_weights(q[:, -1:], k, gates)
            torch.testing.assert_close(torch.einsum("bhnt,bthv->bnhv", weights, v), o[:, -1:], **EXACT)


@named(VARIANTS)
def test_a_carried_memory_equals_the_whole(name: str, options: Any) -> None:
    for config in with_normaliser(name, options):
        torch.manual_seed(5)
        attention = build_attention(config, 12, 3).double()
        x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y, _ = attention(x)
        first, middle = attention(x[:, :4])
        second, _ = attention(x[:, 4:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), y, **EXACT)
        gradients = torch.autograd.grad(y.square().sum(), list(attention.parameters()))
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)


@named(VARIANTS)
def test_padding_leaves_the_memory_as_it_is_or_is_refused(name: str, options: Any) -> None:
    memory = memory_of(config_of(name, options), D, V, H)
    rule = memory.rule
    inputs = make_inputs(rule, 2, 9, H, D, V)
    written = torch.tensor([True] * 5 + [False] * 4).expand(2, 9)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if not rule.takes_padding:
        with pytest.raises(ValueError, match=f"rule {name} .*leave padding out"):
            memory(q, k, v, gates_of(rule, inputs), written=written)
        return
    _, state = memory(q, k, v, gates_of(rule, inputs), written=written)
    short = steps(rule, inputs, 0, 5)
    _, expected = memory(short["q"], short["k"], short["v"], gates_of(rule, short))
    for ours, theirs in zip(state.memory, expected.memory, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@named(VARIANTS)
def test_state_size_counts_the_numbers_of_the_state(name: str, options: Any) -> None:
    for config in with_normaliser(name, options):
        memory = memory_of(config, D, V, 1)
        inputs = make_inputs(memory.rule, 1, 3, 1, D, V)
        _, state = memory(inputs["q"], inputs["k"], inputs["v"], gates_of(memory.rule, inputs))
        counted = sum(x.numel() for x in (*state.memory, *(() if state.z is None else (state.z,))))
        assert memory.state_size(V) == counted


@named(VARIANTS)
def test_a_rule_without_a_non_causal_form_refuses_one(name: str, options: Any) -> None:
    memory = memory_of(config_of(name, options), D, V, H)
    inputs = make_inputs(memory.rule, 2, 9, H, D, V)
    arguments = (inputs["q"], inputs["k"], inputs["v"], gates_of(memory.rule, inputs))
    if memory.rule.causal_only:
        with pytest.raises(ValueError, match=f"rule {name} writes in an order"):
            memory(*arguments, causal=False)
    else:
        o, state = memory(*arguments, causal=False)
        torch.testing.assert_close(o, memory.read(inputs["q"], state), **EXACT)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_computes_and_who_wrote_it(name: str) -> None:
    rule = RULES[name]
    assert rule.__doc__
    assert "=" in rule.__doc__.splitlines()[0] or "<-" in rule.__doc__.splitlines()[0]
    assert any(year in rule.source for year in map(str, range(1990, 2027)))
