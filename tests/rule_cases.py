"""Inputs for tests of any rule of the registry, and what comes out with all gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fwp_lightning import ops
from fwp_lightning.attention import RULES, AttentionConfig, FastWeightMemory, Rule

# sums of at most a few thousand float64 terms of order 1
EXACT = {"rtol": 1e-9, "atol": 1e-10}
SMALL = torch.empty(1, 2, 1, 1, dtype=torch.float64)
Inputs = dict[str, Tensor]


def config_of(rule: str, options: Any = None, **axes: Any) -> AttentionConfig:
    """The rule alone: keys and queries as they are, unless ``axes`` say otherwise."""
    return AttentionConfig(**{"rule": rule, "feature_map": "identity", "rule_options": options, **axes})


def variants(rule: str) -> Iterator[Any]:
    """The rule's own options: its defaults, and each other value that a choice of them has."""
    kind = RULES[rule].Options
    yield None
    if kind is not None:
        for name, hint in get_type_hints(kind).items():
            others = get_args(hint) if get_origin(hint) is Literal else ()
            yield from (kind(**{name: value}) for value in others if value != getattr(kind(), name))


def memory_of(config: AttentionConfig, d_key: int, d_value: int, n_heads: int) -> FastWeightMemory:
    """A memory in float64 whose parameters, if it has any, are the same each time."""
    torch.manual_seed(5)
    return FastWeightMemory(config, d_key, n_heads=n_heads, d_value=d_value).double()


def make_inputs(
    rule: Rule, b: int, t: int, h: int, d_key: int, d_value: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    """Inputs by name; keys have norms near 1, so that a delta write neither explodes nor forgets at once."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    pairs = rule.pairs * t
    inputs = {"q": normal(b, t, h, d_key), "k": normal(b, pairs, h, d_key) / math.sqrt(d_key)}
    inputs["v"] = normal(b, pairs, h, d_value)
    for gate in rule.gates:
        inputs[gate.name] = gate.of(normal(b, pairs, h, 1 if gate.size == "number" else d_value))
    return {name: x.to(dtype) for name, x in inputs.items()}


def steps(rule: Rule, inputs: Inputs, start: int, stop: int | None) -> Inputs:
    """A part of the steps: a rule may write several pairs at each."""
    n = rule.pairs
    ends = None if stop is None else n * stop
    return {name: x[:, start:stop] if name == "q" else x[:, n * start : ends] for name, x in inputs.items()}


def run(
    rule: Rule, inputs: Inputs, state: tuple[Tensor, ...] | None = None, *, backend: str = "auto", causal: bool = True
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Outputs and the last state of the rule by itself."""
    gates = tuple(inputs[gate.name] for gate in rule.gates)
    q, k, v = inputs.get("q"), inputs["k"], inputs["v"]
    return rule.scan(q, k, v, gates=gates, state=state, backend=backend, causal=causal)


def leaves(inputs: Inputs) -> Inputs:
    return {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}


def weighted(tensors: Iterable[Tensor | None]) -> Tensor:
    """A scalar that depends on every component differently."""
    total = torch.zeros((), dtype=torch.float64)
    for x in tensors:
        if x is not None:
            total = total + (x.double() * torch.sin(1 + torch.arange(x.numel(), dtype=torch.float64)).view_as(x)).sum()
    return total


def some_state(rule: Rule, b: int, h: int, d_key: int, d_value: int, dtype: torch.dtype = torch.float64) -> Any:
    """A state that the rule can have: what other inputs leave."""
    inputs = make_inputs(rule, b, 5, h, d_key, d_value, seed=77)
    return tuple(x.detach().to(dtype) for x in run(rule, inputs)[1])


def results_and_gradients(rule: Rule, inputs: Inputs, state: Any = None, *, backend: str = "auto") -> Inputs:
    """Outputs, last state, and the gradients of inputs, incoming state and parameters."""
    inputs = leaves(inputs)
    state = None if state is None else tuple(x.detach().clone().requires_grad_() for x in state)
    o, last = run(rule, inputs, state, backend=backend)
    parameters = dict(rule.named_parameters())
    wanted = {**inputs, **{f"state {i}": x for i, x in enumerate(state or ())}, **parameters}
    gradients = torch.autograd.grad(weighted([o, *last]), list(wanted.values()))
    found = {f"grad {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {**({} if o is None else {"o": o}), **{f"last {i}": x for i, x in enumerate(last)}, **found}


def assert_same(ours: Inputs, theirs: Inputs, **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def backends_of(rule: Rule) -> list[str]:
    """What runs the rule here; a rule without an op of its own has one way."""
    return ops.backends_of(rule.op, SMALL) or ["auto"]
