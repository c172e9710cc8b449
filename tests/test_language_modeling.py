"""The language modelling task: its schedule, what is carried and what is not, evaluations word by word, resume."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fwp_lightning.attention import AttentionConfig, FavorConfig
from fwp_lightning.data.wikitext import WikiTextData
from fwp_lightning.models.transformer import Architecture
from fwp_lightning.sweep.training import SILENT_TRAINER, ExactCheckpoint, quiet_lightning
from fwp_lightning.tasks.language_modeling import SPLITS, Evaluation, LanguageModelingTask, _compile

DELTA = AttentionConfig(rule="delta", phi_norm="sum")
SUM = AttentionConfig(rule="sum", attention_norm="readout")
SOFTMAX = AttentionConfig(rule="softmax", feature_map="identity")
FAVOR = AttentionConfig(rule="delta", feature_map="favor", phi_norm="sum", n_features=4)
FROZEN_FAVOR = dataclasses.replace(FAVOR, favor=FavorConfig(redraw="never"))
FWM = AttentionConfig(rule="fwm", feature_map="tanh")
# the task counts in float64, Lightning keeps what is logged in float32
SINGLE = 2e-7
SIZES = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 8, "cutoffs": [40, 200]}
CARRIED = {"context": "carried", "evaluation": Evaluation(kind="segments")}


def make_task(attention: AttentionConfig = DELTA, **options: Any) -> LanguageModelingTask:
    sizes = {**SIZES, **options.pop("sizes", {})}
    given = {"evaluation": Evaluation(stride=8), "lr": 1e-2, "warmup_steps": 2, "max_steps": 20, **options}
    return LanguageModelingTask(attention, Architecture(**sizes), **given)


def make_data(**options: Any) -> WikiTextData:
    given = {"n_tokens": 2000, "length": 12, "batch_size": 6, "steps_per_block": 5, "evaluation_batch_size": 2}
    return WikiTextData(**{**given, **options})


class Curves(Callback):
    """What Lightning would have logged: losses of blocks and of validations."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.valid: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.valid.append(float(trainer.callback_metrics["valid/loss"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train.append(float(trainer.callback_metrics["train/loss"]))


class SaveAfter(ExactCheckpoint):
    """Saves once, after some blocks."""

    def __init__(self, blocks: int, path: Path) -> None:
        super().__init__(None, seconds=math.inf, stop=lambda: None)  # type: ignore[arg-type]
        self.blocks, self.path = blocks, path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 == self.blocks:
            trainer.save_checkpoint(self.path)


def make_trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    given = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, "gradient_clip_val": 0.25}
    return L.Trainer(callbacks=list(callbacks), logger=False, **{**given, **SILENT_TRAINER, **options})


def fit(
    task: LanguageModelingTask,
    data: WikiTextData,
    *callbacks: Callback,
    seed: int | None = 1,
    ckpt_path: Path | None = None,
    **trainer: Any,
) -> Curves:
    if seed is not None:
        torch.manual_seed(seed)
    curves = Curves()
    with quiet_lightning():
        fitted = make_trainer(curves, *callbacks, **trainer)
        fitted.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    return curves


def score(task: LanguageModelingTask, data: WikiTextData, **trainer: Any) -> dict[str, float]:
    with quiet_lightning():
        tester = make_trainer(**trainer)
        tester.test(task, data, verbose=False)
    return {name: float(value) for name, value in tester.callback_metrics.items()}


def untrained(task: LanguageModelingTask, data: WikiTextData) -> LanguageModelingTask:
    torch.manual_seed(1)
    task.model = task.build_model(data).double()  # type: ignore[assignment]
    for parameter in task.model.parameters():
        # far from uniform, so that every word's context matters
        torch.nn.init.normal_(parameter, std=0.3)
    return task


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_step", "update", "lr"),
    [
        ("full", 1, 2.5e-4),
        ("warm", 1, 1.25e-7),
        ("full", 2, 1.25e-7),
        ("warm", 2, 1.25e-7),
        ("full", 2000, 2.49875e-4),
        ("full", 2001, 2.49990e-4),
        ("full", 250_001, 1.25e-4),
        ("full", 500_001, 0.0),
    ],
)
def test_learning_rates_are_those_of_the_released_schedule(first_step: Any, update: int, lr: float) -> None:
    task = make_task(lr=2.5e-4, warmup_steps=2000, max_steps=500_000, first_step=first_step)
    assert task.lr * task.lr_factor(update - 1) == pytest.approx(lr, rel=1e-5, abs=1e-12)


class Rates(Callback):
    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_update_uses_its_learning_rate(accumulation: int) -> None:
    rates = Rates()
    task = make_task(first_step="full", warmup_steps=4, max_steps=10)
    fit(task, make_data(accumulation=accumulation), rates, accumulate_grad_batches=accumulation)
    assert task.steps == 10
    cosine = [1e-2 * (1 + math.cos(math.pi * done / 10)) / 2 for done in range(4, 10)]
    assert rates.used == pytest.approx([1e-2, 1e-2 / 4, 2e-2 / 4, 3e-2 / 4, *cosine])


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_learns_and_counts() -> None:
    task = make_task(max_steps=60)
    curves = fit(task, make_data(), check_val_every_n_epoch=2)
    assert len(curves.valid) == 6
    assert curves.valid[-1] < curves.valid[0] - 0.2
    steps = [make_data().training_segments(step)[0].targets.numel() for step in range(60)]
    assert (task.steps, task.tokens) == (60, sum(steps))


@pytest.mark.parametrize("context", ["segment", "carried"])
def test_accumulation_trains_as_the_whole_batch_does(context: Any) -> None:
    options = {"sizes": {"dropout": 0.0, "positions": "none"}, **(CARRIED if context == "carried" else {})}
    whole, parts = make_task(**options), make_task(**options)
    fit(whole, make_data())
    fit(parts, make_data(accumulation=3), accumulate_grad_batches=3)
    for (name, ours), theirs in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        # float32 sums in another order; Adam divides by the size of a gradient, however small
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("context", ["segment", "carried"])
def test_two_processes_train_and_score_as_one_does(context: Any) -> None:
    options = {"sizes": {"dropout": 0.0, "positions": "none"}, **(CARRIED if context == "carried" else {})}
    tasks, metrics = [], []
    for how in ({}, {"strategy": "ddp_fork", "devices": 2}):
        task = make_task(**options)
        torch.manual_seed(5)
        # built here, so that the trained weights come back from the other processes
        task.model = task.build_model(make_data())  # type: ignore[assignment]
        with quiet_lightning():
            trainer = make_trainer(**how)
            trainer.fit(task, make_data())
        tasks.append(task)
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert metrics[-1]["step"] == 20
        metrics[-1] |= {name: value for name, value in score(task, make_data(), **how).items() if name != "step"}
    # float32 sums in another order
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5)
    for ours, theirs in zip(tasks[1].model.parameters(), tasks[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_carried_states_reach_the_next_segment_and_start_anew_with_the_text() -> None:
    seen = []
    task = make_task(**CARRIED, sizes={"positions": "none"}, max_steps=30)
    data = make_data()
    build = task.build_model

    def spying(datamodule: L.LightningDataModule) -> torch.nn.Module:
        model = build(datamodule)
        model.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output[1])))
        return model

    task.build_model = spying  # type: ignore[method-assign]
    fit(task, data, check_val_every_n_epoch=6)
    training = seen[:30]
    per_pass = data.steps_per_epoch
    assert 1 < per_pass < 30
    for step, (given, _) in enumerate(training):
        if step % per_pass == 0:
            assert given is None
            continue
        last = training[step - 1][1]
        for ours, left in zip(given, last, strict=True):
            assert torch.equal(ours.memory[0], left.memory[0])
            assert not ours.memory[0].requires_grad


def test_limited_context_carries_nothing() -> None:
    seen = []
    task = make_task(max_steps=5)
    data = make_data()
    task.model = task.build_model(data)  # type: ignore[assignment]
    task.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    fit(task, data)
    assert seen
    assert all(state is None for state in seen)


@pytest.mark.parametrize("attention", [DELTA, SUM, SOFTMAX, FAVOR], ids=lambda a: f"{a.rule} {a.feature_map}")
def test_mixed_precision_trains_as_single_precision_does(attention: AttentionConfig) -> None:
    curves = []
    for precision in ("32-true", "bf16-mixed"):
        curves.append(fit(make_task(attention), make_data(), precision=precision).valid)
    # bfloat16 has 8 bits: a product is off by up to 0.4 %, a mean over thousands of them by far less
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[1] != curves[0]


XL_SIZES = {"positions": "relative", "memory": 9}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.compile without its code generator, which takes a minute; yields what Dynamo counts."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    torch.compiler.reset()
    yield counters
    torch.compiler.reset()


class Repeated(torch.nn.Module):
    """Every kind of state is a graph of its own."""

    def forward(self, x: torch.Tensor, state: list[int]) -> torch.Tensor:
        for _ in state:
            x = x + x
        return x


def test_every_model_of_a_process_is_compiled_whatever_came_before(traced: Any) -> None:
    traced.clear()
    for _ in range(2):
        compiled = _compile(Repeated())
        for length in range(1, 10):
            assert float(compiled(torch.ones(()), [0] * length)) == 2**length
    # PyTorch compiles a function eight times by default, and then goes on uncompiled
    assert traced["frames"] == {"total": 18, "ok": 18}


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one_does() -> None:
    losses = [
        fit(make_task(max_steps=5, compute=compute, sizes={"dropout": 0.0}), make_data(), limit_val_batches=0).train
        for compute in ("eager", "compiled")
    ]
    # float32 sums in another order
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_as_diverged() -> None:
    task = make_task(max_steps=50)
    data = make_data()
    task.model = task.build_model(data)  # type: ignore[assignment]
    task.model.words.cluster_bias.data.fill_(math.nan)
    fit(task, data)
    assert task.steps == 5
    assert task.diverged == "the training loss is nan in the block before step 5"


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 5, 12])
@pytest.mark.parametrize("attention", [DELTA, SOFTMAX], ids=lambda a: a.rule)
def test_windows_score_every_word_but_the_first_with_its_context(attention: AttentionConfig, stride: int) -> None:
    data = make_data(n_tokens=800)
    task = untrained(make_task(attention, evaluation=Evaluation(stride=stride, batch_size=7)), data).eval()
    tokens = torch.tensor(data.tokens("valid").astype("int64"))
    starts: dict[int, int] = {}
    for start in [*range(0, len(tokens) - 13, stride), len(tokens) - 13]:
        for position in range(12):
            # a word is scored by the first window that reaches it
            starts.setdefault(start + position, start)
    total = 0.0
    for position, start in starts.items():
        hidden, _ = task.model(tokens[start : start + 12].unsqueeze(0))
        nll = task.model.words.nll(hidden[0, position - start].unsqueeze(0), tokens[position + 1].view(1))
        total += nll.item()
    assert len(starts) == len(tokens) - 1
    assert score(task, data)["valid/perplexity"] == pytest.approx(math.exp(total / len(starts)), rel=SINGLE)


DPFP = AttentionConfig(rule="sum", feature_map="dpfp", attention_norm="readout")
CARRIABLE = {"delta": DELTA, "sum": SUM, "favor": FROZEN_FAVOR, "fwm": FWM, "dpfp": DPFP}
CARRIABLE["delta, both normalised"] = dataclasses.replace(DELTA, attention_norm="both")


@pytest.mark.parametrize("length", [5, 12, 33])
@pytest.mark.parametrize("name", CARRIABLE)
def test_carried_segments_score_as_the_text_in_one_piece(name: str, length: int) -> None:
    data = make_data(length=length, batch_size=2)
    task = untrained(make_task(CARRIABLE[name], **CARRIED, sizes={"positions": "none"}), data).eval()
    tokens = torch.tensor(data.tokens("test").astype("int64"))
    hidden, _ = task.model(tokens[:-1].unsqueeze(0))
    whole = task.model.words.nll(hidden[0], tokens[1:]).mean().exp().item()
    assert score(task, data)["test/perplexity"] == pytest.approx(whole, rel=SINGLE)


def test_segments_of_a_limited_model_start_from_nothing() -> None:
    data = make_data()
    task = untrained(make_task(evaluation=Evaluation(kind="segments")), data).eval()
    tokens = torch.tensor(data.tokens("test").astype("int64"))
    pieces = [
        task.model.words.nll(
            task.model(tokens[i : i + 12][: len(tokens) - 1 - i].unsqueeze(0))[0][0], tokens[i + 1 : i + 13]
        )
        for i in range(0, len(tokens) - 1, 12)
    ]
    expected = torch.cat(pieces).mean().exp().item()
    assert score(task, data)["test/perplexity"] == pytest.approx(expected, rel=SINGLE)


def test_transformer_xl_is_scored_in_each_context() -> None:
    data = make_data(n_tokens=1200)
    xl = {"positions": "relative", "memory": 12, "n_layers": 2}
    evaluation = Evaluation(kind="segments", contexts=[[5, 1], [7, 4]])
    task = untrained(make_task(SOFTMAX, context="carried", evaluation=evaluation, sizes=xl), data).eval()
    found = score(task, data)
    tokens = torch.tensor(data.tokens("valid").astype("int64"))
    for number, (memory, target) in enumerate(evaluation.contexts, start=1):
        task.model.memory_length = memory  # type: ignore[union-attr]
        state, nll = None, []
        for i in range(0, len(tokens) - 1, target):
            segment = tokens[i : i + target][: len(tokens) - 1 - i]
            hidden, state = task.model(segment.unsqueeze(0), state)
            nll.append(task.model.words.nll(hidden[0], tokens[i + 1 : i + 1 + len(segment)]))
        expected = torch.cat(nll).mean().exp().item()
        assert found[f"valid/perplexity_{number}"] == pytest.approx(expected, rel=SINGLE)
        assert found[f"model/state_millions_{number}"] == pytest.approx(2 * (memory + target) * 2 * 8 / 1e6)


def test_the_words_that_are_scored_are_all_but_the_first() -> None:
    data = make_data()
    task = untrained(make_task(), data)
    score(task, data)
    assert [int(scored.count) for scored in task._scores] == [len(data.tokens(split)) - 1 for split in SPLITS]


def test_an_untrained_adaptive_softmax_knows_the_clusters_and_no_more() -> None:
    data = make_data(n_tokens=5000)
    task = make_task(sizes={"d_model": 64, "n_heads": 4, "n_layers": 2, "cutoffs": [40, 200]})
    torch.manual_seed(1)
    task.model = task.build_model(data)  # type: ignore[assignment]
    # 40 words and two clusters in the head, 160 words in one cluster, the rest in the other
    choices = torch.tensor([42, 42 * 160, 42 * (data.vocabulary_size - 200)], dtype=torch.float64)
    targets = torch.tensor(data.tokens("test")[1:].astype("int64"))
    expected = choices[torch.bucketize(targets, torch.tensor([40, 200]), right=True)].log().mean().exp().item()
    # as below: logits are no zeros
    assert score(task, data)["test/perplexity"] == pytest.approx(expected, rel=0.16)


def test_an_untrained_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    data = make_data(n_tokens=5000)
    task = make_task(sizes={"d_model": 64, "n_heads": 4, "n_layers": 2, "cutoffs": []})
    torch.manual_seed(1)
    task.model = task.build_model(data)  # type: ignore[assignment]
    # logits have a standard deviation of 0.02 sqrt(64) = 0.16; a quarter of the targets are one word, the end of line,
    # so that it does not average out
    assert score(task, data)["test/perplexity"] == pytest.approx(data.vocabulary_size, rel=0.16)


def test_the_weights_of_the_best_validation_are_scored() -> None:
    task = make_task(max_steps=60, lr=0.5)
    data = make_data()
    curves = fit(task, data, check_val_every_n_epoch=1)
    best = min(curves.valid)
    assert curves.valid[-1] > best + 0.01, "the test needs a run that ends worse than it was"
    score(task, data)
    with quiet_lightning():
        (found,) = make_trainer().validate(task, data, verbose=False)
    assert found["valid/loss"] == pytest.approx(best, rel=1e-6)


# --- resume -----------------------------------------------------------------------------------------------------------

RESUMED = {
    "delta": (DELTA, {}, 1),
    "favor redrawn": (FAVOR, {}, 1),
    "sum carried": (SUM, {**CARRIED, "sizes": {"positions": "none"}}, 1),
    "delta carried in parts": (DELTA, {**CARRIED, "sizes": {"positions": "none"}}, 2),
    "frozen favor carried": (FROZEN_FAVOR, {**CARRIED, "sizes": {"positions": "none"}}, 1),
    "fwm carried": (FWM, {**CARRIED, "sizes": {"positions": "none"}}, 1),
    "Transformer-XL": (SOFTMAX, {**CARRIED, "sizes": XL_SIZES}, 1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_in_the_middle_of_the_text_equals_an_undisturbed_one_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    attention, options, accumulation = RESUMED[name]
    path = tmp_path / "mid.ckpt"
    how = {"accumulate_grad_batches": accumulation, "check_val_every_n_epoch": 2}
    data = {"accumulation": accumulation}
    undisturbed = make_task(attention, max_steps=40, **options)
    whole = fit(undisturbed, make_data(**data), SaveAfter(3, path), **how)
    assert 15 % make_data(**data).steps_per_epoch, "the checkpoint is to lie within the text"
    resumed = make_task(attention, max_steps=40, **options)
    # what the resumed process drew before must not matter
    rest = fit(resumed, make_data(**data), SaveAfter(0, path), seed=987, ckpt_path=path, **how)
    assert rest.train == whole.train[3:]
    assert rest.valid == whole.valid[1:]
    ours, theirs = resumed.state_dict(), undisturbed.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert (resumed.steps, resumed.tokens) == (undisturbed.steps, undisturbed.tokens)
    assert score(resumed, make_data(**data)) == score(undisturbed, make_data(**data))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "options", "sentence"),
    [
        (DELTA, {"lr": 0.0}, r"model\.lr=0\.0 must be > 0"),
        (DELTA, {"max_steps": 0}, r"model\.max_steps=0 must be > 0"),
        (DELTA, {"warmup_steps": 21}, r"model\.warmup_steps=21 must be from 0 to max_steps=20"),
        (DELTA, {"first_step": "half"}, r"model\.first_step='half' is unknown\. Known: full, warm"),
        (DELTA, {"context": "carried"}, "evaluation.kind=windows starts every window from an empty state"),
        (DELTA, CARRIED, "architecture.positions=sinusoidal starts again in every segment"),
        (SOFTMAX, {**CARRIED, "sizes": {"positions": "none"}}, "a carried state grows without bound"),
        (FAVOR, {**CARRIED, "sizes": {"positions": "none"}}, "favor.redraw=training draws other features"),
        (SOFTMAX, {"sizes": {"positions": "relative"}}, "set model.context: carried"),
        (DELTA, {"evaluation": Evaluation(contexts=[[4, 4]])}, "evaluation.contexts are Transformer-XL's"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:40],
)
def test_what_does_not_go_together_is_refused(attention: AttentionConfig, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        make_task(attention, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"kind": "words"}, "evaluation.kind='words' is unknown. Known: windows, segments"),
        ({"stride": 0}, "evaluation.stride=0 must be a whole number >= 1"),
        ({"contexts": [[4]]}, r"evaluation.contexts holds \[4\]"),
        ({"contexts": [[4, 0]]}, r"evaluation.contexts holds \[4, 0\]"),
        ({"largest_distance": -1}, "evaluation.largest_distance=-1"),
    ],
)
def test_senseless_evaluations_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Evaluation(**wrong)


def test_a_frozen_random_matrix_may_be_carried() -> None:
    assert make_task(FROZEN_FAVOR, **CARRIED, sizes={"positions": "none"}).context == "carried"


def test_a_carried_normaliser_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    make_task(SUM, **CARRIED, sizes={"positions": "none"})
    assert "z grows over the whole text" in caplog.text


def test_numbers_of_trainer_and_data_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=1 must be data.accumulation=2"):
        fit(make_task(), make_data(accumulation=2))
    with pytest.raises(ValueError, match=r"model\.max_steps=20 must be a multiple of the 15 steps between validations"):
        fit(make_task(), make_data(), check_val_every_n_epoch=3)
