"""The compiled training of a memory of pairs against PyTorch: loss, gradients, Adam, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fwp_lightning import compiled, ops
from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.ops import AdamState, PairBatches, PairMemory, PairParameters, pair_training
from fwp_lightning.tasks.retrieval import BlockAdam, retrieval_loss

pytestmark = pytest.mark.skipif(
    compiled.why_unavailable("pair_training") is not None,
    reason="the kernel cannot be built here (tests/test_compiled.py tests that the reason is said)",
)


def favor(
    rule: str, stabilizer: str, scaling: str, m: int = 24, redraw: str = "never", **axes: object
) -> AttentionConfig:
    options = FavorConfig(stabilizer=stabilizer, scaling=scaling, redraw=redraw)  # type: ignore[arg-type]
    return AttentionConfig(rule, "favor", n_features=m, favor=options, **axes)  # type: ignore[arg-type]


CONFIGS = {
    "softmax": AttentionConfig("softmax", "identity"),
    "identity sum": AttentionConfig("sum", "identity"),
    "elu sum": AttentionConfig("sum", "elu", attention_norm="readout"),
    "dpfp-1 sum": AttentionConfig("sum", "dpfp", nu=1, attention_norm="readout"),
    "dpfp-2 sum": AttentionConfig("sum", "dpfp", nu=2, attention_norm="readout"),
    "dpfp-3 sum": AttentionConfig("sum", "dpfp", nu=3, attention_norm="readout"),
    "favor sum": favor("sum", "none", "none", attention_norm="readout"),
    "stabilised favor sum": favor("sum", "sequence", "rsqrt_sqrt_d", 19, attention_norm="readout"),
    "elu delta": AttentionConfig("delta", "elu", phi_norm="sum"),
    "dpfp-1 delta": AttentionConfig("delta", "dpfp", nu=1, phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6),
    "dpfp-2 delta": AttentionConfig("delta", "dpfp", nu=2, phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6),
    "favor delta": favor("delta", "none", "none", phi_norm="sum"),
    "stabilised favor delta": favor("delta", "vector", "rsqrt_sqrt_d", 19, phi_norm="sum", key_norm_eps=1e-6),
    "tanh fwm": AttentionConfig("fwm", "tanh"),
    "dpfp-1 fwm": AttentionConfig("fwm", "dpfp", nu=1),
}


def build(config: AttentionConfig, n_keys: int, d_key: int, dtype: torch.dtype = torch.float64) -> RetrievalModel:
    torch.manual_seed(11)
    readout_norm = "layer_norm" if config.rule == "fwm" else "none"
    return RetrievalModel(config, n_keys, d_key, readout_norm=readout_norm, compute="factored").to(dtype)  # type: ignore[arg-type]


def draw(n_steps: int, batch: int, pairs: int, n_keys: int, seed: int = 5) -> PairBatches:
    g = torch.Generator().manual_seed(seed)
    sizes = [(n_steps, batch, n) for n in (pairs, pairs, 1, 1)]
    return PairBatches(*(torch.randint(n_keys, size, generator=g) for size in sizes))


def in_pytorch(model: RetrievalModel, batches: PairBatches) -> list[Tensor]:
    keys, values, query, target = (x[0] for x in batches)
    loss = retrieval_loss(model(keys, values, query), target).mean()
    return [loss, *torch.autograd.grad(loss, [p for p in model.pair_parameters if p is not None])]


def in_cpp(model: RetrievalModel, batches: PairBatches) -> list[Tensor]:
    loss, gradients = ops.pair_gradients(
        model.pair_memory, model.pair_parameters, batches, model.training_directions(1)
    )
    return [loss[0], *(g for g in gradients if g is not None)]


@pytest.mark.parametrize(("batch", "pairs", "d_key"), [(1, 1, 5), (3, 7, 8), (17, 2, 9), (5, 33, 16), (2, 12, 20)])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_pytorch_at_odd_sizes(name: str, batch: int, pairs: int, d_key: int) -> None:
    model, batches = build(CONFIGS[name], 7, d_key), draw(1, batch, pairs, 7)
    for ours, theirs in zip(in_cpp(model, batches), in_pytorch(model, batches), strict=True):
        # float64 sums of a few hundred terms; LayerNorm divides by standard deviations of about 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "pairs"), [(1, 1), (2, 6), (5, 33)])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_pytorch_at_the_papers_size_of_a_key(name: str, batch: int, pairs: int) -> None:
    """There rings and recurrences stay in registers, sequences of the delta rule go in pairs and tokens in fours."""
    model, batches = build(CONFIGS[name], 9, 64), draw(1, batch, pairs, 9)
    for ours, theirs in zip(in_cpp(model, batches), in_pytorch(model, batches), strict=True):
        # as above
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_keys", [1, 2, 3, 7])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_memory_held_before_does_not_matter(
    name: str, n_keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of up to three keys are narrower than any vector."""
    model, batches, found = build(CONFIGS[name], n_keys, 5, dtype), draw(1, 3, 4, n_keys), []
    for held in (0.0, math.nan):

        def room(parameters: PairParameters, held: float = held) -> PairParameters:
            return PairParameters(*(None if x is None else torch.full_like(x, held) for x in parameters))

        monkeypatch.setattr(pair_training, "_empty_like", room)
        found.append(in_cpp(model, batches))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0, equal_nan=True)
    # of one key LayerNorm leaves nothing
    assert n_keys == 1 or all(x.isfinite().all() for x in found[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_errors_are_at_most_twice_those_of_pytorch(name: str) -> None:
    """Relative to each gradient's largest entry, the mean of five draws: the error of one draw is a matter of luck."""
    errors, references = [], []
    for seed in range(5):
        batches = draw(1, 16, 40, 20, seed)
        exact = in_pytorch(build(CONFIGS[name], 20, 64), batches)
        single = build(CONFIGS[name], 20, 64, torch.float32)
        errors.append(relative_errors(in_cpp(single, batches), exact))
        references.append(relative_errors(in_pytorch(single, batches), exact))
    # 2e-6: some ten roundings, where PyTorch happens to have almost none
    assert (torch.stack(errors).mean(0) <= 2 * (torch.stack(references).mean(0) + 2e-6)).all()


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    pairs = [(x.detach().double(), truth.detach()) for x, truth in zip(found, exact, strict=True)]
    return torch.stack([(x - truth).abs().max() / (truth.abs().max() + 1e-12) for x, truth in pairs])


@pytest.mark.parametrize("name", ["favor sum", "stabilised favor sum", "favor delta", "stabilised favor delta"])
def test_favor_keeps_its_digits_where_the_two_halves_of_a_key_cancel(name: str) -> None:
    """Products of table rows underflow there, exp(a) exp(-a); such pairs are computed anew."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = build(CONFIGS[name], 6, 16, torch.float64)
        with torch.no_grad():
            # value halves of size 40 that point against the key halves of the same id
            halves = torch.nn.functional.linear(model.key_embedding, model.W_k[:, 6:])
            model.W_k[:, 6:] *= 15.0
            model.W_k[:, :6] = -15.0 * halves.T * (1 + 0.01 * torch.randn(16, 6).double())
        model = model.to(dtype)
        ids = torch.arange(6).repeat(2, 1).unsqueeze(0)
        batches = PairBatches(ids, ids, ids[..., 1:2], ids[..., 1:2])
        results.append((in_cpp(model, batches), in_pytorch(model, batches)))
    for ours, theirs in zip(*results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    for ours, exact in zip(results[1][0], results[0][1], strict=True):
        # float32: exponents of size 100 carry a relative error of 1e-5 into their exponentials
        assert float((ours - exact).detach().abs().max()) <= 1e-3 * float(exact.detach().abs().max()) + 1e-6


@pytest.mark.parametrize("size", [30.0, 50.0, 80.0, 86.9, 120.0])
@pytest.mark.parametrize("name", ["elu sum", "elu delta"])
def test_elu_keeps_its_digits_where_key_and_value_halves_are_large(name: str, size: float) -> None:
    """Exponentials of table rows are multiplied as long as each is a normal number: products may leave the range."""
    model = build(CONFIGS[name], 6, 16)
    with torch.no_grad():
        model.b_k.zero_()
        halves = torch.nn.functional.linear(model.key_embedding, model.W_k[:, 6:])
        largest = halves.abs().max()
        model.W_k[:, 6:] *= size / largest
        # for every second id a value half against its key half, for the others one along it
        signs = torch.tensor([-0.99, 0.99]).repeat(3).double()
        model.W_k[:, :6] = (size / largest * halves * signs[:, None]).T
    ids = torch.arange(6).repeat(2, 1).unsqueeze(0)
    batches = PairBatches(ids, ids, ids[..., 1:2], ids[..., 1:2])
    exact = in_pytorch(model, batches)
    for ours, truth in zip(in_cpp(model, batches), exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-10)
    for ours, truth in zip(in_cpp(model.float(), batches), exact, strict=True):
        # as above
        assert float((ours - truth).detach().abs().max()) <= 1e-3 * float(truth.detach().abs().max()) + 1e-6


# of 130 keys Adam takes the embedding in blocks of rows, of which the last is smaller
@pytest.mark.parametrize(
    ("name", "n_keys"), [*((name, 7) for name in CONFIGS), ("elu sum", 130), ("dpfp-1 delta", 130)]
)
def test_a_block_of_steps_equals_torch_adam_step_by_step(name: str, n_keys: int) -> None:
    config = CONFIGS[name]
    batches = draw(5, 4, 9, n_keys)
    ours, theirs = build(config, n_keys, 16), build(config, n_keys, 16)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    expected = []
    for keys, values, query, target in zip(*batches, strict=True):
        optimizer.zero_grad()
        loss = retrieval_loss(theirs(keys, values, query), target).mean()
        loss.backward()
        optimizer.step()
        expected.append(loss.detach())
    block = BlockAdam(ours, lr=1e-2)
    block.block = RetrievalBlock(*batches)
    block.step()
    # Adam divides by the size of the gradient: rounding of a gradient that is almost 0 becomes visible
    torch.testing.assert_close(block.losses, torch.stack(expected), rtol=1e-6, atol=1e-9)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if name == "softmax" and p is ours.b_k:
            continue  # a shift of all keys changes no softmax: Adam makes steps of rounding there
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert float(block.state[p]["step"]) == 5


def test_adams_steps_in_float32_are_exact_for_squares_of_every_size() -> None:
    """Squares near 0 and infinity take roots and quotients of the processor, all others estimates that are refined."""
    model, batches = build(CONFIGS["elu sum"], 20, 64, torch.float32), draw(1, 4, 9, 20)
    parameters = model.pair_parameters
    exponents = [torch.linspace(-44.0, 38.6, p.numel()).view_as(p) for p in parameters if p is not None]
    squares = [10.0**exponent for exponent in exponents]
    for square in squares:
        square.view(-1)[::7] = 0.0
    assert any(square.isinf().any() for square in squares)
    means = [(0.1 + torch.rand_like(square)) * square.clamp(max=1e30).sqrt() for square in squares]
    missing = [None] * (len(parameters) - len(squares))
    lr, eps, betas, steps = 0.5, 1e-8, (0.9, 0.999), 7
    before = [p.detach().clone() for p in parameters if p is not None]
    with torch.no_grad():
        adam = AdamState(PairParameters(*means, *missing), PairParameters(*squares, *missing), steps, lr, betas, eps)
        ops.train_pairs(model.pair_memory, parameters, adam, batches)
    for p, old, mean, square in zip(parameters, before, means, squares, strict=False):
        assert p is not None
        root = math.sqrt(1 - betas[1] ** (steps + 1))
        rate = lr / (1 - betas[0] ** (steps + 1))
        step = rate * mean.double() / (square.double().sqrt() / root + eps)
        # a rounding of the difference and three of the step
        allowed = 2.0**-24 * (p.double().abs() + 6 * step.abs())
        assert ((p.double() - (old.double() - step)).abs() <= allowed).all()


def test_redrawn_directions_are_those_that_single_steps_would_have_drawn() -> None:
    config = favor("sum", "none", "none", 40, "training", attention_norm="readout")
    ours, theirs = build(config, 7, 16), build(config, 7, 16)
    assert torch.equal(ours.memory.feature_map.directions, theirs.memory.feature_map.directions)
    drawn = ours.training_directions(3)
    for directions in drawn:
        theirs.memory.feature_map.start_sequence()
        torch.testing.assert_close(theirs.memory.feature_map.directions, directions, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.memory.feature_map.directions, drawn[-1])


@pytest.mark.parametrize("name", ["dpfp-3 sum", "dpfp-2 delta", "tanh fwm"])
def test_a_block_in_two_parts_ends_bit_for_bit_where_it_ends_in_one(name: str) -> None:
    batches = draw(5, 4, 9, 7)
    models = [build(CONFIGS[name], 7, 16, torch.float32) for _ in range(2)]
    for model, parts in zip(models, ([5], [2, 3]), strict=True):
        optimizer = BlockAdam(model, lr=1e-2)
        for part in zip(*(x.split(parts) for x in batches), strict=True):
            optimizer.block = RetrievalBlock(*part)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_gradients_leave_the_parameters_alone_and_come_out_the_same_twice() -> None:
    model, batches = build(CONFIGS["dpfp-2 delta"], 6, 8), draw(1, 5, 9, 6)
    before = [p.detach().clone() for p in model.parameters()]
    first, second = (in_cpp(model, batches) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_nan_is_not_lost(name: str) -> None:
    model, batches = build(CONFIGS[name], 6, 8, torch.float32), draw(1, 2, 4, 6)
    with torch.no_grad():
        model.b_k[0] = float("nan")
    assert math.isnan(in_pytorch(model, batches)[0])
    assert math.isnan(in_cpp(model, batches)[0])


def test_a_sequence_without_pairs_reads_zeros() -> None:
    model = build(CONFIGS["elu delta"], 6, 8)
    empty = torch.empty(1, 3, 0, dtype=torch.int64)
    loss, *gradients = in_cpp(model, PairBatches(empty, empty, *(torch.zeros(1, 3, 1, dtype=torch.int64),) * 2))
    assert float(loss) == 0.5
    assert all(float(g.abs().max()) == 0 for g in gradients)


@pytest.mark.parametrize("stray", [6, -1, 2**40])
@pytest.mark.parametrize("bad", ["keys", "values", "queries", "targets"])
def test_ids_outside_the_tables_are_refused_before_memory_is_touched(bad: str, stray: int) -> None:
    model, batches = build(CONFIGS["elu sum"], 6, 8), draw(1, 2, 4, 6)
    getattr(batches, bad)[-1, -1, -1] = stray
    with pytest.raises(ValueError, match=rf"{bad} has the id {stray}, which is outside 0 \.\. 5"):
        in_cpp(model, batches)
    with pytest.raises(ValueError, match=rf"{bad} is torch.int32; ids are int64"):
        in_cpp(model, batches._replace(**{bad: getattr(batches, bad).int()}))


def test_sizes_of_0_are_refused_where_the_kernel_would_divide_by_them() -> None:
    """Whole numbers: the processor ends the process that divides by 0."""

    def gradients(e: int, d_key: int, batch: int, m: int) -> object:
        sizes = ((5, e), (d_key, 5 + e), (d_key,), (d_key, e), (d_key,))
        parameters = PairParameters(*(torch.randn(size) for size in sizes), None, None)
        memory = PairMemory("sum", "favor", attention_norm="readout")
        return ops.pair_gradients(memory, parameters, draw(1, batch, 3, 5), torch.randn(1, m, d_key))

    for sizes, said in (
        ((0, 4, 2, 6), r"embedding has the sizes \(5, 0\)"),
        ((3, 0, 2, 6), r"W_k has the sizes \(0, 8\)"),
        ((3, 4, 0, 6), r"queries has the sizes \(0, 1\)"),
        ((3, 4, 2, 0), r"directions has the sizes \(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=said + "; the compiled training needs at least 1 of each"):
            gradients(*sizes)
    assert gradients(1, 1, 1, 1)


def test_tensors_that_do_not_fit_are_named() -> None:
    model, batches = build(CONFIGS["elu delta"], 6, 8), draw(1, 2, 4, 6)
    memory, parameters = model.pair_memory, model.pair_parameters
    with pytest.raises(ValueError, match=r"W_q has shape \(8, 12\); embedding and keys ask for \(8, 13\)"):
        ops.pair_gradients(memory, parameters._replace(W_q=parameters.W_q[:, :-1].contiguous()), batches)
    with pytest.raises(ValueError, match="W_beta has shape None"):
        ops.pair_gradients(memory, parameters._replace(W_beta=None), batches)
    with pytest.raises(ValueError, match="W_k is not contiguous"):
        ops.pair_gradients(memory, parameters._replace(W_k=parameters.W_k.T.contiguous().T), batches)
    with pytest.raises(ValueError, match=r"directions has shape None; expected \[1 or 1, m, 8\]"):
        ops.pair_gradients(PairMemory("sum", "favor"), parameters, batches)


def test_what_the_kernel_lacks_is_refused_by_name() -> None:
    config = AttentionConfig("sum", "elu", output_scale="rsqrt_d")
    with pytest.raises(
        ValueError, match=r"compute=compiled cannot run: .*no output_scale rsqrt_d.*set model\.compute: auto"
    ):
        RetrievalModel(config, 6, 8, compute="compiled").is_compiled()
    cpu = torch.device("cpu")
    assert "('delta', 'none', 'none')" in str(PairMemory("delta", "elu").why_not(torch.float32, cpu))
    assert "dtype torch.bfloat16" in str(PairMemory("sum", "elu").why_not(torch.bfloat16, cpu))
    assert "kernel_eps 0.1" in str(PairMemory("sum", "favor", kernel_eps=0.1).why_not(torch.float32, cpu))
    assert not RetrievalModel(config, 6, 8, compute="auto").is_compiled()


def test_training_solves_a_small_task() -> None:
    """The number of keys is under the number of features, so that the loss can go to 0."""
    data = RetrievalData(n_keys=10, seed=2)
    model = build(CONFIGS["dpfp-1 sum"], 10, 64, torch.float32)
    optimizer = BlockAdam(model, lr=1e-3)
    for index in range(6):
        optimizer.block = data.block(index)
        optimizer.step()
    assert float(optimizer.losses.mean()) < 0.01


def test_moments_of_another_optimiser_are_taken_up() -> None:
    """What a checkpoint of torch's Adam holds goes on as it would have there."""
    config, batches = CONFIGS["elu sum"], draw(4, 4, 9, 7)
    ours, theirs = build(config, 7, 16), build(config, 7, 16)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)

    def step(keys: Tensor, values: Tensor, query: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        retrieval_loss(theirs(keys, values, query), target).mean().backward()
        optimizer.step()

    for part in list(zip(*batches, strict=True))[:2]:
        step(*part)
    ours.load_state_dict(theirs.state_dict())
    moments = {
        key: PairParameters(*(optimizer.state[p][key].clone() for p in theirs.pair_parameters if p is not None))
        for key in ("exp_avg", "exp_avg_sq")
    }
    adam = AdamState(moments["exp_avg"], moments["exp_avg_sq"], steps=2, lr=1e-2)
    ops.train_pairs(ours.pair_memory, ours.pair_parameters, adam, PairBatches(*(x[2:] for x in batches)))
    for part in list(zip(*batches, strict=True))[2:]:
        step(*part)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8)
