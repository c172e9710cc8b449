"""The associative retrieval data: what a sequence, a query, a target and an evaluation are (Sec. 6.1; SPEC E.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fwp_lightning import compiled
from fwp_lightning.data.retrieval import DRAWS, RetrievalData, draw_block, draw_pairs
from fwp_lightning.seeding import numpy_generator_for


def data(n_keys: int = 20, replacement: bool = False, **options: Any) -> RetrievalData:
    return RetrievalData(n_keys=n_keys, replacement=replacement, **{"seed": 1, **options})


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def last_value(keys: list[int], values: list[int], query: int) -> int:
    """The definition: go through the pairs in order and keep what was stored last."""
    stored: dict[int, int] = {}
    for key, value in zip(keys, values, strict=True):
        stored[key] = value
    return stored[query]


# --- sequences --------------------------------------------------------------------------------------------------------


def test_setting_1_keys_and_values_are_permutations_of_their_own() -> None:
    block = data(12).block(0)
    assert block.keys.shape == block.values.shape == (100, 32, 12)
    everything = torch.arange(12).expand(100, 32, 12)
    assert torch.equal(block.keys.sort(-1).values, everything)
    assert torch.equal(block.values.sort(-1).values, everything)
    # independent permutations agree at 1 of 12 positions on average
    agreement = (block.keys == block.values).double().mean()
    assert float(agreement) == pytest.approx(1 / 12, abs=0.005)


def test_setting_1_every_key_is_equally_likely_at_every_position() -> None:
    keys = flat(data(6).block(0).keys)
    counts = torch.stack([(keys == key).double().mean(0) for key in range(6)])
    # 3200 sequences: 5 standard errors of a probability of 1/6
    assert float((counts - 1 / 6).abs().max()) < 5 * math.sqrt(5 / 36 / 3200)


def test_setting_2_draws_twice_as_many_pairs_uniformly_and_independently() -> None:
    d = data(8, replacement=True)
    block = d.block(0)
    assert d.length == 16
    assert block.keys.shape == (100, 32, 16)
    for ids in (block.keys, block.values):
        assert int(ids.min()) == 0
        assert int(ids.max()) == 7
    joint = torch.bincount((block.keys * 8 + block.values).flatten(), minlength=64).double() / block.keys.numel()
    assert float((joint - 1 / 64).abs().max()) < 5 * math.sqrt(1 / 64 / block.keys.numel())
    # independent from one position to the next
    repeats = (block.keys[..., 1:] == block.keys[..., :-1]).double().mean()
    assert float(repeats) == pytest.approx(1 / 8, abs=0.01)


def test_a_sequence_length_is_s_or_twice_s() -> None:
    assert data(9).length == 9
    assert data(9, replacement=True).length == 18


# --- queries and targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [False, True])
def test_the_target_is_the_value_last_stored_under_the_query(replacement: bool) -> None:
    block = data(7, replacement, steps_per_block=20).block(3)
    rows = [flat(x).tolist() for x in block]
    for keys, values, (query,), (target,) in zip(*rows, strict=True):
        assert query in keys
        assert target == last_value(keys, values, query)


def test_overwritten_pairs_do_occur_and_are_not_the_target() -> None:
    block = data(7, replacement=True).block(0)
    first = (block.keys == block.query).int().argmax(-1, keepdim=True)
    overwritten = block.values.gather(-1, first) != block.target
    assert 0.1 < float(overwritten.double().mean()) < 0.9


def test_queries_are_uniform_over_positions_so_frequent_keys_are_asked_for_more_often() -> None:
    block = data(5, replacement=True, steps_per_block=400).block(0)
    count = (block.keys == block.query).sum(-1).double()
    # the key at a uniform position occurs 1 + (T - 1)/S times; a uniform distinct key would occur less often
    expected = 1 + 9 / 5
    assert float(count.mean()) == pytest.approx(expected, abs=5 * float(count.std()) / math.sqrt(count.numel()))


def test_every_key_is_queried_equally_often() -> None:
    query = data(6, replacement=True).block(0).query.flatten()
    share = torch.bincount(query, minlength=6).double() / query.numel()
    assert float((share - 1 / 6).abs().max()) < 5 * math.sqrt(5 / 36 / query.numel())


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_queries", [0, 3, 200])
@pytest.mark.parametrize("replacement", [False, True])
def test_evaluation_asks_for_the_distinct_keys_in_increasing_order_up_to_the_limit(
    replacement: bool, max_queries: int
) -> None:
    e = data(9, replacement, max_queries=max_queries).evaluation(0)
    assert e.queries.shape == e.targets.shape == e.mask.shape
    assert e.mask.dtype == torch.bool
    for keys, values, queries, targets, mask in zip(*(x.tolist() for x in e), strict=True):
        expected = sorted(set(keys))[: max_queries or None]
        asked = [q for q, real in zip(queries, mask, strict=True) if real]
        assert asked == expected
        # the padding comes last and names valid ids
        assert mask == sorted(mask, reverse=True)
        assert all(0 <= t < 9 for t in targets)
        assert [t for t, real in zip(targets, mask, strict=True) if real] == [
            last_value(keys, values, q) for q in expected
        ]


def test_above_the_limit_only_the_smallest_key_ids_are_asked_for() -> None:
    e = data(250, max_queries=200).evaluation(0)
    assert torch.equal(e.queries, torch.arange(200).expand(20, 200))
    assert bool(e.mask.all())


@pytest.mark.parametrize(
    ("replacement", "evaluation_length", "length"),
    [(False, "n_keys", 10), (False, "train", 10), (True, "n_keys", 10), (True, "train", 20)],
)
def test_the_length_of_an_evaluation_sequence(replacement: bool, evaluation_length: Any, length: int) -> None:
    e = data(10, replacement, evaluation_length=evaluation_length, evaluation_sequences=4).evaluation(0)
    assert e.keys.shape == e.values.shape == (4, length)


def test_evaluation_sequences_contain_fewer_distinct_keys_than_training_ones() -> None:
    # SPEC E.1: 0.635 N and 0.865 N, i.e. 1 - (1 - 1/N)^L
    n = 100
    d = data(n, replacement=True, max_queries=0, evaluation_sequences=500)
    evaluated = float(d.evaluation(0).mask.sum(1).double().mean()) / n
    assert evaluated == pytest.approx(1 - (1 - 1 / n) ** n, abs=0.005)
    assert evaluated == pytest.approx(0.635, abs=0.006)
    keys = flat(d.block(0).keys[:16])
    trained = float(torch.tensor([len(set(row)) for row in keys.tolist()]).double().mean()) / n
    assert trained == pytest.approx(1 - (1 - 1 / n) ** (2 * n), abs=0.005)
    assert trained == pytest.approx(0.865, abs=0.006)


def test_setting_1_evaluates_permutations() -> None:
    e = data(11).evaluation(2)
    assert torch.equal(e.keys.sort(-1).values, torch.arange(11).expand(20, 11))


# --- reproducibility --------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("replacement", [False, True])
def test_a_block_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(replacement: bool) -> None:
    d = data(8, replacement)
    first, second = d.block(0), d.block(1)
    torch.manual_seed(123)
    other = data(8, replacement)
    other.evaluation(0)
    assert same(other.block(1), second)
    assert same(other.block(0), first)
    assert same(other.evaluation(5), d.evaluation(5))


def test_blocks_evaluations_and_seeds_differ() -> None:
    d = data(8, True, steps_per_block=1, evaluation_length="train", batch_size=20)
    keys = [d.block(0).keys[0], d.block(1).keys[0], d.evaluation(0).keys, d.evaluation(1).keys]
    keys += [data(8, True, steps_per_block=1, batch_size=20, seed=2).block(0).keys[0]]
    assert len({tuple(x.flatten().tolist()) for x in keys}) == len(keys)


def test_drawing_leaves_the_global_generator_alone() -> None:
    d = data(8)
    state = torch.get_rng_state()
    d.block(0)
    d.evaluation(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_data_follow_the_seed_of_the_run() -> None:
    torch.manual_seed(41)
    first = data(8, seed=None)
    torch.rand(100)
    torch.manual_seed(41)
    assert same(first.block(0), data(8, seed=None).block(0))
    torch.manual_seed(42)
    assert not same(first.block(0), data(8, seed=None).block(0))


def test_how_often_is_evaluated_does_not_change_what_is_evaluated() -> None:
    assert same(data(8, steps_per_block=10).evaluation(1), data(8, steps_per_block=100).evaluation(1))


# --- the smallest and the senseless -----------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [False, True])
def test_a_single_key_works(replacement: bool) -> None:
    d = data(1, replacement, batch_size=1, steps_per_block=1, evaluation_sequences=1)
    block, e = d.block(0), d.evaluation(0)
    assert block.keys.shape == (1, 1, 2 if replacement else 1)
    assert not any(x.any() for x in block)
    assert e.queries.tolist() == e.targets.tolist() == [[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_keys": 0}, r"data\.n_keys=0 must be a whole number >= 1"),
        ({"n_keys": -3}, r"data\.n_keys=-3"),
        ({"n_keys": 2.5}, r"data\.n_keys=2\.5 must be a whole number"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"steps_per_block": 0}, r"data\.steps_per_block=0"),
        ({"evaluation_sequences": 0}, r"data\.evaluation_sequences=0"),
        ({"max_queries": -1}, r"data\.max_queries=-1"),
        ({"evaluation_length": "S"}, r"data\.evaluation_length='S' is unknown\. Known: n_keys, train"),
    ],
    ids=str,
)
def test_senseless_numbers_are_refused_with_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RetrievalData(**options)
    assert "\n" not in str(caught.value)


# --- compiled ---------------------------------------------------------------------------------------------------------

GENERATORS: dict[str, Callable[[], np.random.Generator]] = {
    "fresh": lambda: numpy_generator_for(3, "train", 7),
    "counter near its end": lambda: np.random.Generator(np.random.Philox(key=5, counter=2**64 - 40)),
    "number at hand": lambda: used(np.random.Generator(np.random.Philox(5))),
    "another kind": lambda: np.random.default_rng(5),
}


def used(generator: np.random.Generator) -> np.random.Generator:
    generator.integers(10, size=3)
    return generator


@pytest.fixture
def in_numpy(monkeypatch: pytest.MonkeyPatch) -> Any:
    def draw(draws: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "why_unavailable", lambda _: "no compiler")
            return draws()

    return draw


@pytest.mark.skipif(
    compiled.why_unavailable(DRAWS) is not None,
    reason="the kernel cannot be built here (tests/test_compiled.py tests that the reason is said)",
)
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    ("n_keys", "length", "replacement"),
    [
        # masks of 1 to 10 bits, their ends included
        *((n, n, False) for n in (1, 2, 3, 4, 5, 16, 17, 33, 600)),
        *((n, 2 * n, True) for n in (1, 2, 3, 20, 64, 200)),
        (9, 4, False),
    ],
)
def test_compiled_draws_are_numpys_and_leave_its_generator_where_numpy_does(
    n_keys: int, length: int, replacement: bool, generator: str, in_numpy: Any
) -> None:
    def draws() -> tuple[Tensor, ...]:
        g = GENERATORS[generator]()
        block = draw_block((3, 5), n_keys, length, replacement, g)
        # an odd number of 32 bits next, and one of 64
        after = torch.from_numpy(np.stack([g.integers(7, size=3), g.integers(2**62, size=3)]))
        pairs = draw_pairs((4,), n_keys, length, replacement, GENERATORS[generator]())
        return (*block, after, *pairs)

    for ours, numpys in zip(draws(), in_numpy(draws), strict=True):
        assert torch.equal(ours, numpys)
