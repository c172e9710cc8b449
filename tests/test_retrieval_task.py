"""The retrieval task: its loss, its evaluation, its stop rule, and resuming from a checkpoint bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.data.retrieval import RetrievalData
from fwp_lightning.models.retrieval import RetrievalModel
from fwp_lightning.sweep.training import quiet_lightning
from fwp_lightning.tasks.retrieval import RetrievalTask, retrieval_loss

ELU = AttentionConfig("sum", "elu", attention_norm="readout")
DPFP = AttentionConfig("delta", "dpfp", phi_norm="sum", query_norm_eps=1e-6)


def favor(redraw: Any) -> AttentionConfig:
    return AttentionConfig(
        "sum", "favor", attention_norm="readout", n_features=6, favor=FavorConfig(redraw=redraw, stabilizer="none")
    )


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_lightning():
        yield


def make_task(attention: AttentionConfig = ELU, kind: type[RetrievalTask] = RetrievalTask, **options: Any) -> Any:
    torch.manual_seed(1)
    return kind(attention, **{"d_key": 6, "max_steps": 20, "stop_loss": 0.0, **options})


def make_data(**options: Any) -> RetrievalData:
    return RetrievalData(
        **{"n_keys": 5, "batch_size": 4, "steps_per_block": 5, "evaluation_sequences": 3, "seed": 3, **options}
    )


def make_trainer(*callbacks: L.Callback) -> L.Trainer:
    # max_epochs only guards the tests: the task ends training by itself
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=200,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


class Evaluations(L.Callback):
    """Keeps each evaluation and training loss."""

    def __init__(self) -> None:
        self.valid: list[float] = []
        self.train: list[float] = []
        self.steps: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.valid.append(float(trainer.callback_metrics["valid/loss"]))
        self.steps.append(pl_module.steps)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))


def fit(task: Any, data: RetrievalData, *callbacks: L.Callback, ckpt_path: Path | None = None) -> Evaluations:
    seen = Evaluations()
    trainer = make_trainer(seen, *callbacks)
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.current_epoch < 200, "the task did not end training"
    return seen


# --- loss and evaluation ----------------------------------------------------------------------------------------------


def test_predicting_zero_costs_one_half() -> None:
    loss = retrieval_loss(torch.zeros(2, 3, 7), torch.randint(7, (2, 3)))
    torch.testing.assert_close(loss, torch.full((2, 3), 0.5), rtol=0, atol=0)


def test_the_loss_is_half_the_squared_error_to_the_onehot_target() -> None:
    g = torch.Generator().manual_seed(0)
    y, target = torch.randn(2, 3, 7, generator=g), torch.randint(7, (2, 3), generator=g)
    before = y.clone()
    expected = 0.5 * (torch.nn.functional.one_hot(target, 7) - y).square().sum(-1)
    torch.testing.assert_close(retrieval_loss(y, target), expected)
    torch.testing.assert_close(y, before, rtol=0, atol=0)
    perfect = torch.nn.functional.one_hot(target, 7).float()
    assert not retrieval_loss(perfect, target).any()


def query_losses(task: Any, data: RetrievalData) -> list[Tensor]:
    """Each sequence's query losses, one query at a time, with padding left out."""
    e = data.evaluation(0)
    rows = []
    for keys, values, queries, targets, mask in zip(*e, strict=True):
        losses = []
        for query, target in zip(queries[mask], targets[mask], strict=True):
            y = task.model(keys[None], values[None], query[None, None])[0, 0]
            losses.append(0.5 * (torch.nn.functional.one_hot(target, data.n_keys) - y).square().sum())
        rows.append(torch.stack(losses).double())
    return rows


@pytest.mark.parametrize("mean", ["chunks", "queries"])
def test_the_evaluation_mean(mean: Any) -> None:
    # batch_size 3: queries of a sequence come in chunks of 3 and a shorter last one that weighs as much
    data = make_data(n_keys=8, replacement=True, batch_size=3, evaluation_sequences=6)
    task = make_task(DPFP, evaluation_mean=mean)
    (found,) = make_trainer().validate(task, datamodule=data, verbose=False)
    with torch.no_grad():
        rows = query_losses(task, data)
    chunks = [chunk for row in rows for chunk in row.split(3)]
    assert {len(chunk) for chunk in chunks} > {3}
    means = {"chunks": torch.stack([c.mean() for c in chunks]).mean(), "queries": torch.cat(rows).mean()}
    assert float(means["chunks"]) != pytest.approx(float(means["queries"]), rel=1e-4)
    assert found["valid/loss"] == pytest.approx(float(means[mean]), rel=1e-5)


@pytest.mark.parametrize("mean", ["chunks", "queries"])
@pytest.mark.parametrize(("redraw", "matrices"), [("always", 9), ("training", 0), ("never", 0)])
def test_redraw_always_evaluates_every_chunk_with_a_matrix_of_its_own(redraw: str, matrices: int, mean: Any) -> None:
    # 3 sequences of 5 keys in chunks of 2: 3 chunks each
    data, task = make_data(batch_size=2), make_task(favor(redraw), evaluation_mean=mean)
    make_trainer().validate(task, datamodule=data, verbose=False)
    phi = task.model.memory.feature_map
    drawn: list[Tensor] = []
    resample = phi.resample

    def counted() -> None:
        resample()
        drawn.append(phi.directions.clone())

    phi.resample = counted
    make_trainer().validate(task, datamodule=data, verbose=False)
    assert len(drawn) == matrices
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("mean", ["chunks", "queries"])
def test_evaluating_by_chunk_gives_the_same_as_at_once_where_nothing_is_random(mean: Any) -> None:
    data, task = make_data(n_keys=8, replacement=True, batch_size=3), make_task(favor("never"), evaluation_mean=mean)
    (at_once,) = make_trainer().validate(task, datamodule=data, verbose=False)
    phi = task.model.memory.feature_map
    phi.redraw, phi.resample = "always", lambda: None
    (by_chunk,) = make_trainer().validate(task, datamodule=data, verbose=False)
    assert by_chunk["valid/loss"] == pytest.approx(at_once["valid/loss"], rel=1e-5)


def test_validating_alone_is_no_evaluation_of_the_stop_rule() -> None:
    task = make_task()
    make_trainer().validate(task, datamodule=make_data(), verbose=False)
    assert int(task._strikes) == 0
    assert math.isinf(float(task._best))


# --- the stop rule ----------------------------------------------------------------------------------------------------


class Scripted(RetrievalTask):
    """Evaluates to losses written down beforehand."""

    script: Sequence[float] = ()

    def evaluate(self, batch: Any) -> Tensor:
        self.count = getattr(self, "count", -1) + 1
        return torch.tensor(self.script[self.count], dtype=torch.float64)


NAN = math.nan
SCRIPTS: dict[str, tuple[dict[str, Any], list[float], int]] = {
    "reaching stop_loss exactly": ({"stop_loss": 1e-3}, [0.5, 0.2, 1e-3, 0.0], 3),
    "below stop_loss at once": ({"stop_loss": 0.6}, [0.5, 0.4], 1),
    "just above stop_loss goes on": ({"stop_loss": 1e-3, "max_steps": 10}, [0.5, 1.0001e-3, 1.0001e-3], 2),
    "no new minimum": ({"patience": 3}, [0.5, 0.6, 0.6, 0.6, 0.1], 4),
    "an equal loss is no new minimum": ({"patience": 2}, [0.5, 0.5, 0.5, 0.1], 3),
    "a new minimum starts the count anew": ({"patience": 2}, [0.5, 0.6, 0.4, 0.6, 0.5, 0.1], 5),
    "better than before but not best": ({"patience": 2}, [0.5, 0.7, 0.6, 0.1], 3),
    "nan is no new minimum": ({"patience": 2}, [0.5, NAN, NAN, 0.1], 3),
    "nan from the start": ({"patience": 3}, [NAN, NAN, NAN, 0.1], 3),
    "a nan does not become the minimum": ({"patience": 2}, [0.5, NAN, 0.4, 0.45, NAN, 0.1], 5),
    "patience 1": ({"patience": 1}, [0.5, 0.5, 0.1], 2),
    # the released code stops when strikes exceed 10: at the 11th, patience 11 here
    "as released": ({"patience": 11, "max_steps": 500}, [0.5] + [0.6] * 11 + [0.1], 12),
    "max_steps": ({"max_steps": 15}, [0.5, 0.4, 0.3, 0.2], 3),
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_the_stop_rule(what: str) -> None:
    options, script, evaluations = SCRIPTS[what]
    task = make_task(kind=Scripted, **{"patience": 10, "max_steps": 100, **options})
    task.script = script
    seen = fit(task, make_data())
    assert len(seen.valid) == evaluations
    assert task.steps == 5 * evaluations
    assert task.diverged is None


@pytest.mark.parametrize("max_steps", [3, 5, 12])
def test_max_steps_is_never_exceeded(max_steps: int) -> None:
    task = make_task(max_steps=max_steps)
    seen = fit(task, make_data())
    assert task.steps == max_steps
    assert seen.steps[-1] == max_steps


def test_steps_and_tokens_count_what_was_trained() -> None:
    task = make_task(max_steps=10)
    fit(task, make_data(replacement=True))
    assert task.steps == 10
    # 10 steps of 4 sequences of 10 pairs
    assert task.tokens == 400


class Poison(L.Callback):
    """Spoils a parameter at the start of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.model.W_k.data.fill_(math.nan)


def test_nan_in_training_ends_as_diverged() -> None:
    task = make_task(max_steps=100)
    seen = fit(task, make_data(), Poison(2))
    assert task.steps == 15
    assert task.diverged
    assert "nan" in task.diverged
    assert math.isnan(seen.valid[-1])
    assert all(math.isfinite(loss) for loss in seen.valid[:-1])


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_adam_on_one_query_a_sequence() -> None:
    task, data = make_task(lr=1e-2, max_steps=5), make_data()
    other = make_task(lr=1e-2)
    torch.manual_seed(2)
    other.model = other.build_model(data)
    torch.manual_seed(2)
    task.model = task.build_model(data)
    seen = fit(task, data)
    optimizer = torch.optim.Adam(other.model.parameters(), lr=1e-2)
    losses = []
    for keys, values, query, target in zip(*data.block(0), strict=True):
        onehot = torch.nn.functional.one_hot(target[:, 0], 5)
        loss = (0.5 * (onehot - other.model(keys, values, query)[:, 0]).square()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert seen.train[0] == pytest.approx(sum(losses) / 5, rel=1e-5)
    for ours, theirs in zip(task.model.parameters(), other.model.parameters(), strict=True):
        # fused and plain Adam round differently
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_training_learns_to_retrieve() -> None:
    task = make_task(ELU, d_key=16, lr=1e-2, max_steps=600, stop_loss=0.02, patience=100)
    seen = fit(task, make_data(n_keys=4, batch_size=16, steps_per_block=10))
    assert seen.valid[0] > 0.1
    assert seen.valid[-1] <= 0.02
    assert task.steps < 600


@pytest.mark.parametrize("compute", ["plain", "factored"])
def test_two_runs_of_one_seed_are_equal(compute: Any) -> None:
    runs = [fit(make_task(DPFP, compute=compute), make_data()) for _ in range(2)]
    assert runs[0].valid == runs[1].valid
    assert len(runs[0].valid) == 4


def test_describe_counts_the_trained_parameters() -> None:
    task = make_task(DPFP)
    fit(task, make_data())
    facts = task.describe()
    # embedding 5 x 11, W_k 6 x 16 and b_k, W_q 6 x 11 and b_q, beta 16 + 1
    assert facts["n_params"] == 55 + 96 + 6 + 66 + 6 + 17
    assert facts["state"] == 12 * 5
    assert facts["rule"] == "delta"


COMPUTED = {
    "dpfp delta": DPFP,
    "elu delta": AttentionConfig("delta", "elu", phi_norm="sum", key_norm_eps=1e-3, query_norm_eps=1e-2),
    "elu delta, raw keys": AttentionConfig("delta", "elu"),
    "dpfp delta, readout": AttentionConfig("delta", "dpfp", phi_norm="sum", attention_norm="readout"),
    "dpfp delta, both": AttentionConfig("delta", "dpfp", phi_norm="sum", attention_norm="both"),
    "dpfp delta, scaled": AttentionConfig("delta", "dpfp", phi_norm="sum", output_scale="rsqrt_d"),
    "elu sum": ELU,
    "elu sum, large eps": AttentionConfig("sum", "elu", attention_norm="readout", attention_norm_eps=0.5),
    "elu sum, no norm": AttentionConfig("sum", "elu"),
    "elu sum, phi_norm": AttentionConfig("sum", "elu", phi_norm="sum"),
    "elu sum, scaled": AttentionConfig("sum", "elu", attention_norm="readout", output_scale="rsqrt_d"),
    "tanh fwm": AttentionConfig("fwm", "tanh"),
    "tanh fwm, scaled": AttentionConfig("fwm", "tanh", output_scale="rsqrt_d"),
    "dpfp-3 fwm": AttentionConfig("fwm", "dpfp", nu=3),
    "softmax": AttentionConfig("softmax", "identity"),
    "favor": favor("never"),
}


@pytest.mark.parametrize("compute", ["auto", "factored"])
@pytest.mark.parametrize("name", COMPUTED)
def test_how_it_is_computed_changes_neither_predictions_nor_gradients(name: str, compute: Any) -> None:
    outputs = []
    for how in ("plain", compute):
        torch.manual_seed(4)
        model = RetrievalModel(COMPUTED[name], 7, d_key=6, compute=how).double()
        results = []
        # not a multiple of a vector's width, one, none; one query and several
        for sequences, queries in ((19, 1), (1, 1), (0, 1), (3, 2)):
            g = torch.Generator().manual_seed(sequences)
            keys, values = (torch.randint(7, (sequences, 14), generator=g) for _ in range(2))
            y = model(keys, values, keys[:, :queries])
            weight = torch.sin(1 + torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
            results += [y, *torch.autograd.grad((y * weight).sum(), list(model.parameters()))]
        outputs.append(results)
    for theirs, ours in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def projections_of(model: RetrievalModel) -> list[tuple[Tensor | None, ...]]:
    """The parameters, each weight with its bias."""
    p = model.pair_parameters
    return [(p.embedding,), (p.W_k, p.b_k), (p.W_q, p.b_q), *([] if p.W_beta is None else [(p.W_beta, p.b_beta)])]


@pytest.mark.parametrize("compute", ["auto", "factored"])
@pytest.mark.parametrize(
    "name", ["dpfp delta", "elu delta", "elu delta, raw keys", "elu sum", "tanh fwm", "dpfp-3 fwm"]
)
def test_float32_gradients_are_about_as_exact_as_those_of_the_plain_form(name: str, compute: Any) -> None:
    results = []
    for how, dtype in (("plain", torch.float64), ("plain", torch.float32), (compute, torch.float32)):
        torch.manual_seed(4)
        model = RetrievalModel(COMPUTED[name], 8, d_key=6, compute=how).to(dtype)
        g = torch.Generator().manual_seed(1)
        keys, values = (torch.randint(8, (19, 16), generator=g) for _ in range(2))
        y = model(keys, values, keys[:, :1])
        weight = torch.sin(1 + torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        projections = [[p for p in pair if p is not None] for pair in projections_of(model)]
        flat = [p for pair in projections for p in pair]
        grads = iter(torch.autograd.grad((y.double() * weight).sum(), flat))
        results.append([y, *(torch.cat([next(grads).flatten() for _ in pair]) for pair in projections)])
    truth, plain, ours = results
    for true, x, other in zip(truth, ours, plain, strict=True):
        error, allowed = ((a.double() - true).norm() / true.norm() for a in (x, other))
        # a weight and its bias together: a bias alone is a sum that nearly cancels, and either form may have luck in it
        assert error <= 4 * allowed + 5 * torch.finfo(torch.float32).eps, f"error {error:.1e}, plain {allowed:.1e}"


# --- resuming ---------------------------------------------------------------------------------------------------------


class SaveAfter(L.Callback):
    """Saves a checkpoint at the end of an epoch, as the sweep does."""

    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


RESUMED = {
    "elu sum": ELU,
    "dpfp delta": DPFP,
    "tanh fwm": AttentionConfig("fwm", "tanh"),
    "softmax": AttentionConfig("softmax", "identity"),
    "favor, drawn in training": favor("training"),
    "favor, drawn always": favor("always"),
    "favor, drawn once": favor("never"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mid.ckpt"
    undisturbed = make_task(RESUMED[name], max_steps=30)
    whole = fit(undisturbed, make_data(replacement=True), SaveAfter(2, path))
    resumed = make_task(RESUMED[name], max_steps=30)
    # what the resumed process drew before must not matter
    torch.manual_seed(987)
    rest = fit(resumed, make_data(replacement=True), ckpt_path=path)
    assert len(whole.valid) == 6
    assert rest.valid == whole.valid[3:]
    assert rest.train == whole.train[3:]
    ours, theirs = resumed.state_dict(), undisturbed.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_the_stop_rule_continues_over_a_checkpoint(tmp_path: Path) -> None:
    script = [0.5, 0.4, 0.6, 0.45, 0.6, 0.1]
    path = tmp_path / "mid.ckpt"
    task = make_task(kind=Scripted, patience=3, max_steps=100)
    task.script = script
    assert len(fit(task, make_data(), SaveAfter(2, path)).valid) == 5
    resumed = make_task(kind=Scripted, patience=3, max_steps=100)
    resumed.script = script[3:]
    # one strike before the checkpoint, two after it: 0.45 is no new minimum although this process saw none lower
    assert fit(resumed, make_data(), ckpt_path=path).valid == [0.45, 0.6]
    assert resumed.steps == 25


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_key": 0}, r"model\.d_key=0 must be > 0"),
        ({"lr": 0.0}, r"model\.lr=0\.0 must be > 0"),
        ({"lr": math.nan}, r"model\.lr=nan"),
        ({"patience": 0}, r"model\.patience=0"),
        ({"max_steps": 0}, r"model\.max_steps=0"),
        ({"max_steps": -1}, r"model\.max_steps=-1"),
        ({"stop_loss": math.nan}, r"model\.stop_loss=nan"),
        ({"readout_norm": "layernorm"}, r"model\.readout_norm='layernorm' is unknown.*Known: none, layer_norm"),
        ({"evaluation_mean": "query"}, r"model\.evaluation_mean='query' is unknown.*Known: chunks, queries"),
        ({"compute": "fast"}, r"model\.compute='fast' is unknown.*Known: .*plain, factored"),
    ],
    ids=str,
)
def test_senseless_numbers_are_refused_with_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RetrievalTask(ELU, **options)
    assert "\n" not in str(caught.value)


def test_a_map_that_does_not_fit_the_key_size_is_refused_before_training() -> None:
    task = make_task(AttentionConfig("sum", "dpfp", nu=6), d_key=6)
    with pytest.raises(ValueError, match="nu=6"):
        task.build_model(make_data())
