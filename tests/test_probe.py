"""The probe reports what a memory does: hand-computed values, and nothing about a run changes by being looked at."""

from __future__ import annotations

import csv
import io
import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from fwp_lightning.attention import AttentionConfig, FastWeightMemory
from fwp_lightning.data.retrieval import RetrievalData
from fwp_lightning.data.wikitext import WikiTextData
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.probe import MemoryProbe, Pairs, Place, RunningMoments, effective_rank
from fwp_lightning.tasks.language_modeling import Evaluation, LanguageModelingTask
from fwp_lightning.tasks.retrieval import RetrievalTask

# keys (1, 0), (0, 1), (1, 0): the third pair overwrites the first
KEYS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).reshape(1, 3, 1, 2)
VALUES = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]).reshape(1, 3, 1, 2)
ONE = torch.ones(1, 3, 1)


def memory_of(feature_map: str = "identity", **axes: Any) -> FastWeightMemory:
    return FastWeightMemory(AttentionConfig(feature_map=feature_map, **axes), 2)


def constant_keys(*features: float) -> Tensor:
    """Three keys whose features under ELU+1 are these, each at least 1."""
    return (torch.tensor(features) - 1).expand(1, 3, 1, 2)


def looked(memory: FastWeightMemory, q: Tensor = KEYS, beta: Tensor | None = None) -> MemoryProbe:
    probe = MemoryProbe(map_size=3)
    pairs = Pairs(q, KEYS, VALUES, () if beta is None else (beta,), None)
    probe.look(0, memory, pairs)
    return probe


def mean(probe: MemoryProbe, statistic: str, x: float = 0, y: int = 0) -> float:
    return probe.moments[Place(0, 0, statistic, float(x), y)].mean


# --- what it reports -------------------------------------------------------------------------------------------------


def test_sum_rule_adds_to_what_a_key_held() -> None:
    probe = looked(memory_of(rule="sum"))
    # key (1, 0) retrieves (2, 0) before the third write, which wants (0, 4), and (2, 4) after it
    assert mean(probe, "before_cosine", 3) == pytest.approx(0)
    assert mean(probe, "before_norm", 3) == pytest.approx(2 / 4)
    assert mean(probe, "after_cosine", 3) == pytest.approx(16 / (math.sqrt(20) * 4))
    assert mean(probe, "after_norm", 3) == pytest.approx(math.sqrt(20) / 4)
    # an empty memory retrieves nothing
    assert (mean(probe, "before_norm", 1), mean(probe, "before_cosine", 1)) == (0, 0)


def test_delta_rule_overwrites_what_a_key_held() -> None:
    probe = looked(memory_of(rule="delta"), beta=ONE)
    assert mean(probe, "before_norm", 3) == pytest.approx(2 / 4)
    assert (mean(probe, "after_cosine", 3), mean(probe, "after_norm", 3)) == (pytest.approx(1), pytest.approx(1))


def test_accumulators_grow_with_the_step() -> None:
    probe = looked(memory_of(rule="sum"))
    # z = (1, 0), (1, 1), (2, 1) and q_t = k_t
    assert [mean(probe, "z_phi_q", step) for step in (1, 2, 3)] == pytest.approx([1, 1, 2])
    # W holds 2; 2 and 3; (2, 4) and 3
    assert [mean(probe, "W_norm", t) for t in (1, 2, 3)] == pytest.approx([2, math.sqrt(13), math.sqrt(29)])
    assert mean(probe, "carried_W_norm", 3) == pytest.approx(math.sqrt(29))


def test_spectrum_of_a_memory_of_two_orthogonal_values() -> None:
    probe = looked(memory_of(rule="delta"), beta=ONE)
    # W = [[0, 4], [0, 3]] after the overwrite: rank one
    assert mean(probe, "singular_value", 0) == pytest.approx(5)
    assert mean(probe, "singular_value", 1) == pytest.approx(0, abs=1e-6)
    assert mean(probe, "effective_rank") == pytest.approx(1, abs=1e-4)
    assert mean(probe, "d_dot") == 2


@pytest.mark.parametrize(("values", "rank"), [([1.0, 1.0, 1.0], 3), ([5.0, 0.0, 0.0], 1), ([3.0, 1.0], 1.7547653)])
def test_effective_rank(values: list[float], rank: float) -> None:
    # of (3/4, 1/4): exp(ln 4 - 3/4 ln 3)
    assert effective_rank(torch.tensor(values)).item() == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize(
    ("axes", "ratio"),
    [
        # keys (3, 1): without normalisation a write takes 3 + 1 times as much away as it adds
        ({"phi_norm": "none", "attention_norm": "none"}, 4.0),
        # eq. 29: the features sum to 1
        ({"phi_norm": "sum", "attention_norm": "none"}, 1.0),
        # eq. 27: divided by z_{t-1} . k_t = 10 at the second step, 20 at the third: the mean of 4/10 and 4/20
        ({"phi_norm": "none", "attention_norm": "both"}, 0.3),
    ],
)
def test_remove_weight_over_write_weight(axes: dict[str, str], ratio: float) -> None:
    memory = memory_of("elu", rule="delta", **axes)
    keys = constant_keys(3.0, 1.0)
    probe = MemoryProbe()
    probe.look(0, memory, Pairs(keys, keys, VALUES, (0.5 * ONE,), None))
    # the epsilons are 1e-6
    assert mean(probe, "remove_to_write") == pytest.approx(ratio, rel=1e-5)


def test_a_key_gets_the_share_of_its_squared_norm_back() -> None:
    assert mean(looked(memory_of(rule="delta"), beta=ONE), "self_gain") == pytest.approx(1)
    half = MemoryProbe()
    keys = constant_keys(1.0, 1.0)
    half.look(0, memory_of("elu", rule="delta", phi_norm="sum"), Pairs(keys, keys, VALUES, (ONE,), None))
    # (1/2, 1/2): a write at beta = 1 into an empty memory is half retrieved
    assert mean(half, "self_gain") == pytest.approx(0.5, rel=1e-5)
    assert mean(half, "after_norm", 1) == pytest.approx(0.5, rel=1e-5)


def test_beta_and_its_distribution() -> None:
    probe = looked(memory_of(rule="delta"), beta=torch.tensor([0.05, 0.95, 1.0]).reshape(1, 3, 1))
    assert mean(probe, "beta") == pytest.approx(2 / 3)
    shares = [mean(probe, "beta_share", n / 10) for n in range(10)]
    assert shares == pytest.approx([1 / 3, *[0] * 8, 2 / 3])


def test_map_of_the_delta_rule_takes_the_overwritten_value_away() -> None:
    probe = looked(memory_of(rule="delta"), beta=ONE)
    rows = [[mean(probe, "map", n, t) for t in range(3)] for n in range(3)]
    assert rows == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    rows = [[mean(looked(memory_of(rule="sum")), "map", n, t) for t in range(3)] for n in range(3)]
    assert rows == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_negative_weights_have_a_share() -> None:
    # q = (1, 0), k = (1, 0) then (-1, 0): the second pair is read with weight -1
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).reshape(1, 2, 1, 2)
    probe = MemoryProbe()
    queries = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    probe.look(0, memory_of(rule="sum"), Pairs(queries, keys, VALUES[:, :2], (), None))
    # 1 of the absolute weights 1, 1 and 1
    assert mean(probe, "negative_share") == pytest.approx(1 / 3)
    assert mean(probe, "weight", 1) == pytest.approx(1)


def test_carried_memory_goes_on() -> None:
    memory = memory_of(rule="sum")
    probe = MemoryProbe()
    first = Pairs(KEYS, KEYS, VALUES, (), None)
    probe.look(0, memory, first)
    probe._batch = 1
    probe.look(0, memory, first._replace(state=memory.write(KEYS, VALUES)))
    assert mean(probe, "carried_z_phi_q", 3) == pytest.approx(2)
    assert mean(probe, "carried_z_phi_q", 6) == pytest.approx(4)
    assert mean(probe, "carried_W_norm", 6) == pytest.approx(2 * math.sqrt(29))


def test_softmax_has_weights_and_no_matrix() -> None:
    probe = looked(memory_of(rule="softmax"))
    assert sum(mean(probe, "map", 2, t) for t in range(3)) == pytest.approx(1)
    assert not {place for place in probe.moments if place.statistic in ("W_norm", "singular_value", "carried_W_norm")}


def test_running_moments_are_those_of_all_numbers() -> None:
    numbers = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    moments = RunningMoments()
    for part in numbers.split(7):
        moments.add(len(part), float(part.mean()), float((part - part.mean()).square().sum()))
    assert moments.n == 100
    assert moments.mean == pytest.approx(float(numbers.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(numbers.std()), rel=1e-9)


# --- in a run --------------------------------------------------------------------------------------------------------


class Logged(L.Callback):
    """Keeps what was logged at each validation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trained(task: L.LightningModule, data: L.LightningDataModule, *callbacks: L.Callback, epochs: int = 2) -> Logged:
    logged = Logged()
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, logged],
    )
    trainer.fit(task, data)
    return logged


def retrieval(**axes: Any) -> tuple[RetrievalTask, RetrievalData]:
    attention = AttentionConfig(rule="delta", feature_map="dpfp", phi_norm="sum", **axes)
    data = RetrievalData(n_keys=5, replacement=True, batch_size=4, steps_per_block=5, evaluation_length="train", seed=1)
    return RetrievalTask(attention, d_key=8), data


def language_model(context: str = "carried", **axes: Any) -> tuple[LanguageModelingTask, WikiTextData]:
    attention = AttentionConfig(**{"rule": "delta", "feature_map": "elu", "phi_norm": "sum"} | axes)
    architecture = Architecture(n_layers=2, d_model=16, n_heads=2, d_ff=16, positions="none", cutoffs=[100])
    data = WikiTextData(length=8, batch_size=4, steps_per_block=2, evaluation_batch_size=5, n_tokens=2500)
    task = LanguageModelingTask(
        attention, architecture, Evaluation(kind="segments"), warmup_steps=1, max_steps=4, context=context
    )
    return task, data


@pytest.mark.parametrize("make", [retrieval, language_model])
def test_looking_changes_nothing(make: Any) -> None:
    plain, watched = make(), make()
    before = trained(*plain).seen[-1]
    after = trained(*watched, MemoryProbe(map_size=8)).seen[-1]
    assert before["valid/loss"] == after["valid/loss"]
    assert all(
        torch.equal(a, b) for a, b in zip(plain[0].model.parameters(), watched[0].model.parameters(), strict=True)
    )
    assert not any(part._forward_hooks for part in watched[0].modules())


@pytest.mark.parametrize("make", [retrieval, language_model])
def test_run_has_few_keys_and_one_table(make: Any) -> None:
    probe = MemoryProbe(map_size=8)
    seen = trained(*make(), probe).seen
    tracked = {name for name in seen[-1] if name.startswith("probe/")}
    assert tracked == {f"probe/{name}" for name in ("before_cosine", "after_cosine", "remove_to_write", "self_gain",
                                                    "z_phi_q", "W_norm", "effective_rank", "beta")}  # fmt: skip
    # the sum norm balances every write, but for its epsilon of 1e-6
    assert seen[-1]["probe/remove_to_write"] == pytest.approx(1, abs=1e-4)
    (text,) = probe.texts().values()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len({(row["layer"], row["head"], row["statistic"], row["x"], row["y"]) for row in rows}) == len(rows)
    assert {row["step"] for row in rows} == {"10" if make is retrieval else "4"}


def test_every_layer_and_head_of_a_language_model_is_looked_at_over_the_carried_text() -> None:
    probe = MemoryProbe(batches=1)
    trained(*language_model(), probe)
    places = {(place.layer, place.head) for place in probe.moments}
    assert places == {(0, 0), (0, 1), (1, 0), (1, 1)}
    # 250 words in 5 streams: 49 steps in segments of 8; looked at after 1, 2 and 4 of them
    steps = sorted({place.x for place in probe.moments if place.statistic == "carried_z_phi_q"})
    assert steps == [8, 16, 32]
    norms = [mean(probe, "carried_z_phi_q", x) for x in steps]
    assert norms[0] < norms[1] < norms[2]


def test_every_counts_validations() -> None:
    probe = MemoryProbe(every=2)
    seen = trained(*retrieval(), probe, epochs=2).seen
    assert probe.step == 5
    assert "probe/beta" in seen[0]


def test_retrieval_is_looked_at_where_it_ends_and_every_50_validations_unless_told() -> None:
    def looks(probe: MemoryProbe, steps: int) -> list[int]:
        task, data = retrieval()
        task.max_steps = steps
        seen = trained(task, data, probe, epochs=60).seen
        # what was logged once stays among the metrics: a look is where it changes
        values = [metrics.get("probe/W_norm") for metrics in seen]
        return [n for n, (old, new) in enumerate(itertools.pairwise([None, *values]), 1) if new != old]

    # blocks of five steps; the task stops by itself
    assert looks(MemoryProbe(), 15) == [3]
    assert looks(MemoryProbe(), 260) == [50, 52]
    assert looks(MemoryProbe(every=2), 20) == [1, 3]


@pytest.mark.parametrize("settings", [{"every": 0}, {"batches": 0}, {"sequences": True}, {"map_size": -1}])
def test_numbers_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"MemoryProbe: .* must be a whole number >= "):
        MemoryProbe(**settings)
