"""The fwm rule compiled for the CPU: what its chunks, its scales and its precision could get wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.ops import PairBatches, fwm_recurrence
from fwp_lightning.tasks.retrieval import retrieval_loss

pytestmark = pytest.mark.skipif(
    compiled.why_unavailable(fwm_recurrence.KERNEL) is not None,
    reason="the kernel cannot be built here (tests/test_compiled.py tests that the reason is said)",
)

NAMES = ("q", "k", "v", "beta", "state")
# float64 sums of at most a few thousand terms; a gradient that has decayed is compared with its own size
EXACT = 1e-11
# writes far above, near and far below a norm of 1
WRITES = {"large writes": 3.0, "writes near 1": 0.4, "small writes": 0.01}
SIZES = [
    (1, 1, 1),
    (2, 3, 70),
    (15, 13, 5),
    (16, 4, 8),
    (17, 64, 20),
    (47, 5, 33),
    (70, 17, 37),
    (130, 9, 16),
    (20, 64, 1024),
]
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def make_inputs(
    b: int, t: int, h: int, n_features: int, d_value: int, *, writes: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Keys of norm near 1, and a memory of norm ``writes`` or 1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "q": normal(b, t, h, n_features),
        "k": normal(b, t, h, n_features) / math.sqrt(n_features),
        "v": writes * normal(b, t, h, d_value),
        "beta": torch.rand(b, t, h, generator=g, dtype=torch.float64),
        "state": normal(b, h, n_features, d_value) * min(writes, 1) / math.sqrt(n_features * d_value),
    }


def run(inputs: dict[str, Tensor], backend: str) -> tuple[Tensor | None, Tensor]:
    return ops.fwm_rule(*(inputs.get(name) for name in NAMES), backend=backend)  # type: ignore[arg-type]


def waves(x: Tensor) -> Tensor:
    """A weight for every component, each another one."""
    return torch.sin(1 + torch.arange(x.numel(), dtype=x.dtype)).view_as(x)


def results(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs, last memory and the gradients of both with respect to all inputs."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    found = dict(zip(("o", "last"), run(leaves, backend), strict=True))
    given = {name: x for name, x in found.items() if x is not None}
    gradients = torch.autograd.grad(list(given.values()), list(leaves.values()), [waves(x) for x in given.values()])
    gradients_by_name = {f"grad {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in (given | gradients_by_name).items()}


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm())


def assert_equal(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert ours.keys() == truth.keys()
    for name, true in truth.items():
        assert error(ours[name], true) <= tolerance * float(true.norm()), name


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("absent", [(), ("q",), ("state",), ("q", "state")], ids=lambda x: "no " + " and ".join(x))
@pytest.mark.parametrize(("t", "n_features", "d_value"), SIZES)
def test_equals_the_reference(t: int, n_features: int, d_value: int, absent: tuple[str, ...], writes: float) -> None:
    inputs = make_inputs(2, t, 1 if d_value > 100 else 2, n_features, d_value, writes=writes, seed=t)
    inputs = {name: x for name, x in inputs.items() if name not in absent}
    assert_equal(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "empty"])
def test_gradients_are_those_of_finite_differences_across_a_chunk_border(with_state: bool, writes: float) -> None:
    inputs = make_inputs(1, 18, 1, 2, 2, writes=writes)
    if not with_state:
        del inputs["state"]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    assert gradcheck(lambda *x: run(dict(zip(leaves, x, strict=True)), "cpu"), tuple(leaves.values()))


def test_a_memory_of_any_norm_may_be_carried_in() -> None:
    for norm in (0.0, 1e-3, 1.0, 1e3):
        inputs = make_inputs(1, 20, 1, 6, 5, writes=0.1)
        inputs["state"] *= norm / float(inputs["state"].norm())
        assert_equal(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("n_keys", [3, 37, 70])
@pytest.mark.parametrize("feature_map", ["tanh", "dpfp"])
def test_one_hot_values_in_the_order_of_their_first_write_change_nothing(feature_map: str, n_keys: int) -> None:
    """The retrieval task's values: columns that were not written yet are left out of all products."""
    torch.manual_seed(n_keys)
    config = AttentionConfig("fwm", feature_map, nu=1) if feature_map == "dpfp" else AttentionConfig("fwm", feature_map)
    model = RetrievalModel(config, n_keys, 12, readout_norm="layer_norm", compute="factored").double()
    for pairs in (1, 16, 2 * n_keys + 1):
        batches = PairBatches(*(torch.randint(n_keys, (1, 3, n)) for n in (pairs, pairs, 1, 1)))
        keys, values, query, target = (x[0] for x in batches)
        loss = retrieval_loss(model(keys, values, query), target).mean()
        parameters = [p for p in model.pair_parameters if p is not None]
        expected = torch.autograd.grad(loss, parameters)
        losses, gradients = ops.pair_gradients(model.pair_memory, model.pair_parameters, batches, None)
        torch.testing.assert_close(losses[0], loss.detach(), rtol=EXACT, atol=0)
        for ours, true in zip((x for x in gradients if x is not None), expected, strict=True):
            # LayerNorm divides by standard deviations of about 1e-2
            assert error(ours, true) <= 1e-9 * float(true.norm())


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = make_inputs(3, 40, 2, 8, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(inputs, "cpu", torch.float32)
        torch.set_num_threads(4)
        four = results(inputs, "cpu", torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, four[name]) for name, x in one.items())


# --- precision --------------------------------------------------------------------------------------------------------


def paper_like(steps: int, n_keys: int, seed: int) -> dict[str, Tensor]:
    """What the retrieval task writes at the start of training: tanh features of keys from tables, one-hot values."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randint(n_keys, (4, steps), generator=g) for _ in range(2))
    by_key, by_value = (torch.randn(n_keys, 64, generator=g, dtype=torch.float64) * size for size in (1.0, 0.07))
    return {
        "q": torch.tanh(torch.randn(4, steps, 1, 64, generator=g, dtype=torch.float64)),
        "k": torch.tanh(by_key[keys] + by_value[values]).unsqueeze(2),
        "v": torch.nn.functional.one_hot(values, n_keys).double().unsqueeze(2),
        "beta": torch.sigmoid(torch.randn(4, steps, 1, generator=g, dtype=torch.float64)),
    }


@pytest.mark.parametrize("last_only", [True, False], ids=["read last", "read always"])
@pytest.mark.parametrize("n_keys", [20, 50])
def test_float32_error_is_at_most_twice_that_of_pytorch_on_the_papers_task(n_keys: int, last_only: bool) -> None:
    ratios: dict[str, list[float]] = {}
    for seed in range(5):
        inputs = {name: x.float() for name, x in paper_like(2 * n_keys, n_keys, seed).items()}
        if last_only:
            del inputs["q"]
        truth = results(inputs, "reference")
        ours, plain = (results(inputs, backend, torch.float32) for backend in ("cpu", "reference"))
        for name, true in truth.items():
            ratios.setdefault(name, []).append(error(ours[name], true) / error(plain[name], true))
    # the median of five draws: the ratio of two single errors is a matter of luck
    for name, found in ratios.items():
        assert sorted(found)[2] <= 2, (name, found)


def test_digits_stay_where_gradients_decay() -> None:
    """Each projection removes what rounding left along the memory; otherwise that would outlive the gradient."""
    inputs = make_inputs(1, 60, 1, 40, 30)
    del inputs["q"]
    inputs["k"] *= 4
    truth = results(inputs, "reference")
    sizes = truth["grad v"].norm(dim=-1)[0, :, 0]
    assert float(sizes[0]) < 1e-20 * float(sizes[-1])
    ours = results(inputs, "cpu")
    for name in ("k", "v", "beta"):
        for t in range(60):
            mine, true = (x[f"grad {name}"][0, t] for x in (ours, truth))
            # beta's is a difference of two much larger numbers where a write overshoots: 1 - beta |k|^2 is about -15
            assert error(mine, true) <= 1e-9 * float(true.norm()) + 1e-13 * float(truth["grad v"][0, t].norm()), (
                name,
                t,
            )


def test_gradients_that_decayed_to_zero_are_zero_and_nothing_else() -> None:
    inputs = make_inputs(2, 200, 1, 40, 30)
    del inputs["q"]
    inputs["k"] *= 4
    truth, ours = results(inputs, "reference"), results(inputs, "cpu", torch.float32)
    for name, true in truth.items():
        # entries of float32 below the smallest normal number are 0
        allowed = 1e-3 * true.abs() + 1e-4 * true.abs().amax(-1, keepdim=True) + 1e3 * SMALLEST_NORMAL
        if name != "grad beta":
            assert bool(((ours[name].double() - true).abs() <= allowed).all()), name
    assert not ours["grad k"][:, 0].any()
    assert bool(ours["grad k"][:, -1].all())


@pytest.mark.slow
def test_errors_do_not_grow_over_a_long_sequence() -> None:
    inputs = make_inputs(2, 20_000, 1, 8, 8)
    # one sequence is rescaled at most steps, the other seldom
    inputs["v"][1] *= 0.05
    truth = results(inputs, "scan")
    ours, plain = (results(inputs, backend, torch.float32) for backend in ("cpu", "scan"))
    for name, true in truth.items():
        # 2e-7: three roundings, where the loop happens to have almost none
        assert error(ours[name], true) <= 2 * error(plain[name], true) + 2e-7 * float(true.norm()), name
    exact = results(inputs, "cpu")
    assert_equal(exact, truth)


def test_a_hundred_thousand_steps_lose_no_more_digits_than_a_thousand() -> None:
    steps, around = 100_000, 300
    inputs = make_inputs(1, steps, 1, 4, 8)
    del inputs["state"]
    # some thousand steps are rescaled each time, some thousand seldom
    inputs["v"] *= 1 + 0.9 * torch.sin(torch.arange(steps) / 2000).view(1, -1, 1, 1)
    weights = torch.randn(1, steps, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def windows(x: Tensor) -> Tensor:
        """A thousand steps each, and those around them, as a batch."""
        return x[0].unfold(0, 1000 + 2 * around, 1000).movedim(-1, 1).contiguous()

    def outputs_and_gradients(inputs: dict[str, Tensor], weights: Tensor, backend: str) -> dict[str, Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, _ = run(leaves, backend)
        assert o is not None
        gradients = torch.autograd.grad(o, list(leaves.values()), weights)
        return {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}

    # four directions are overwritten, and their gradients gone, within a few dozen steps: each window stands by itself,
    # to the 1e-10 that is left after 300
    truth = outputs_and_gradients({n: windows(x) for n, x in inputs.items()}, windows(weights), "scan")
    exact = outputs_and_gradients(inputs, weights, "cpu")
    single = outputs_and_gradients({n: x.float() for n, x in inputs.items()}, weights.float(), "cpu")
    for name, true in truth.items():
        for ours, tolerance in ((exact[name], 1e-9), (single[name].double(), 1e-6)):
            error, size = (x[:, around:-around].flatten(1).norm(dim=1) for x in (windows(ours) - true, true))
            # a few dozen roundings of 6e-8 that do not add up in one direction, in the first window as in the last
            assert bool((error <= tolerance * size).all()), (name, float((error / size).max()))


# --- buffers, NaN and subnormal numbers -------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("absent", [(), ("q", "state")], ids=["all inputs", "write only"])
def test_nothing_is_read_before_it_is_written(poisoned_memory: None, absent: tuple[str, ...]) -> None:
    assert bool(torch.empty(3).isnan().all())
    inputs = {name: x for name, x in make_inputs(2, 85, 1, 7, 19).items() if name not in absent}
    assert_equal(results(inputs, "cpu"), results(inputs, "reference"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_not_lost(name: str, value: float) -> None:
    for at in (0, 20):
        inputs = make_inputs(1, 40, 1, 5, 11)
        part = inputs[name][0] if name == "state" else inputs[name][0, at]
        part.view(-1)[0] = value
        ours, truth = (results(inputs, backend) for backend in ("cpu", "reference"))
        for key, true in truth.items():
            finite = ours[key].isfinite()
            assert not bool((finite & ~true.isfinite()).any()), (key, at)
            torch.testing.assert_close(ours[key][finite], true[finite], rtol=1e-9, atol=1e-12)
            # of finite results, those of the same sixteen steps may go with it
            lost = (~finite & true.isfinite()).nonzero()
            assert key != "last" or lost.numel() == 0, at
            assert bool((lost[:, 1] // 16 == at // 16).all()), (key, at)
        if math.isnan(value):
            assert torch.equal(ours["o"].isnan(), truth["o"].isnan())


def test_subnormal_numbers_are_left_to_the_caller() -> None:
    subnormal = torch.full((4,), SMALLEST_NORMAL / 8)
    assert bool((subnormal * 0.5 > 0).all()), "this process flushes them anyway"
    results(make_inputs(1, 20, 1, 4, 4), "cpu", torch.float32)
    assert bool((subnormal * 0.5 > 0).all())


def test_what_is_kept_grows_by_vectors_and_a_memory_every_32_steps() -> None:
    def kept(steps: int, n_features: int, d_value: int) -> int:
        x = [torch.empty(1, steps, 1, n) for n in (n_features, n_features, d_value, 1)]
        problem = fwm_recurrence._problem([*x, None])  # type: ignore[list-item]
        return compiled.count(fwm_recurrence.KERNEL, "kept", torch.float32, problem)

    for n_features, d_value in ((64, 200), (128, 20), (16, 16)):
        per_step = (kept(6400, n_features, d_value) - kept(3200, n_features, d_value)) / 3200
        # two vectors, rounded up to whole registers, the scale and one row of sixteen
        assert per_step <= 2 * (d_value + 16) + 17 + n_features * (d_value + 16) / 32
