"""The benchmark gives no number to a wrong backend, and what it writes is what reports and README read."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fwp_lightning import bench, ops
from fwp_lightning.bench import (
    Request,
    candidates,
    clocks,
    decoding,
    peers,
    records,
    released_retrieval,
    retrieval,
    rules,
    training,
)
from fwp_lightning.bench.candidates import Candidate, draw_inputs, truth_of
from fwp_lightning.bench.clocks import Spread
from fwp_lightning.bench.records import Group, Measurement
from fwp_lightning.bench.shapes import QUICK, SHAPES, gigaflop, shapes_for
from fwp_lightning.cli import main
from fwp_lightning.data.corpora import KNOWN_CORPORA
from fwp_lightning.data.facts import LEXICON
from fwp_lightning.data.retrieval import RetrievalBlock, RetrievalData
from fwp_lightning.experiment import Project, load_experiment, resolve_runs
from fwp_lightning.peak_memory import needed_memory_mb
from fwp_lightning.results_csv import BENCHMARK_COLUMNS, read_benchmarks
from fwp_lightning.tasks.retrieval import retrieval_loss
from fwp_lightning.tracking import Origin
from reports import benchmarks
from reports.__main__ import main as report
from reports.verification import check_reports

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {
    "date": "2026-01-31",
    "device": "cpu",
    "machine": "Some CPU",
    "cores": "2",
    "isa": "v3",
    "torch": "2.13",
    "versions": "python 3.11",
}
ORIGIN = Origin("fwp bench", "abcdef0123456789", "false")


def settings(told: list[str]) -> rules.Settings:
    return rules.Settings("cpu", 1, told.append, quick=True)


@pytest.fixture(autouse=True)
def _short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for clock in (clocks.CPU, clocks.WALL):
        monkeypatch.setattr(clock, "at_least", 0.0)


# --- parity ----------------------------------------------------------------------------------------------------------


def scaled(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    o, _ = ops.delta_rule(q, k, v, beta)
    assert o is not None
    return 1.01 * o


def without_a_gradient(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    o, _ = ops.delta_rule(q, k, v, beta.detach() + 0 * beta)
    assert o is not None
    return o


def not_a_number(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return scaled(q, k, v, beta) * torch.nan


@pytest.mark.parametrize(
    ("wrong", "what"), [(scaled, "its o is off"), (without_a_gradient, "its dL/dbeta is off"), (not_a_number, "its o")]
)
def test_a_wrong_backend_gets_no_number(
    wrong: Callable[..., Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "peers_of", lambda *_, **__: [Candidate("wrong", wrong, truth_of("delta"))])
    monkeypatch.setattr(rules, "RULES", ("delta",))
    told: list[str] = []
    results = list(rules.measure_rules(settings(told), []))
    assert len(results) == 2
    for _, measurements in results:
        names = [measurement.backend for measurement in measurements]
        assert "wrong" not in names
        assert {"reference", "chunked", "gemm"} <= set(names)
    assert len(told) == 1
    assert told[0].startswith("wrong is not measured for delta")
    assert what in told[0]


def test_a_wrong_last_head_is_seen() -> None:
    # the check looks at two heads only: the first and the last, whose sequences are not the same
    def wrong(*inputs: Tensor) -> Tensor:
        o = truth_of("sum")(*inputs)
        return torch.cat([o[:, :, :-1], o[:, :, -1:] * 1.1], dim=2)

    inputs = draw_inputs("sum", QUICK, "cpu", torch.float32)
    assert candidates.disagreement(Candidate("wrong", wrong, truth_of("sum")), inputs)


def test_softmax_agrees_with_its_own_definition_in_its_own_layout() -> None:
    told: list[str] = []
    sdpa = peers.peers_of("delta", "cpu", torch.float32, fetch=False, tell=told.append)[0]
    inputs = draw_inputs("delta", QUICK, "cpu", torch.float32)
    assert candidates.disagreement(sdpa, inputs) is None
    # a rule is no softmax: the check tells them apart
    wrong = Candidate("sdpa", sdpa.compute, truth_of("delta"), heads_first=True)
    assert candidates.disagreement(wrong, inputs)


def test_a_formulation_with_other_losses_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = retrieval.Trainer.take

    def take(self: retrieval.Trainer, block: retrieval.RetrievalBlock) -> Tensor:
        losses = honest(self, block)
        return losses * 1.1 if self.model.compute == "factored" else losses

    monkeypatch.setattr(retrieval.Trainer, "take", take)
    monkeypatch.setattr(retrieval, "ROWS", {"Linear delta": retrieval.ROWS["Linear delta"]})
    told: list[str] = []
    ((group, measurements),) = retrieval.measure_retrieval(settings(told), None)
    assert "factored" not in [measurement.backend for measurement in measurements]
    assert [measurement.backend for measurement in measurements[:2]] == ["released", "plain"]
    assert group.shape == "S=5"
    assert any(line.startswith("factored is not measured for Linear delta at S=5: its losses are off") for line in told)


@pytest.mark.parametrize("n_keys", [7, 61])
@pytest.mark.parametrize("row", retrieval.ROWS)
def test_the_released_formulation_has_our_loss_gradients_and_evaluation(row: str, n_keys: int) -> None:
    attention = retrieval.ROWS[row]
    # neither 7 nor 61 queries are whole batches
    data = RetrievalData(n_keys=n_keys, replacement=attention.rule != "sum", batch_size=5, seed=0)
    few = RetrievalBlock(*(x[:1] for x in data.block(0)))
    exact = functools.partial(retrieval.trainer_of, attention, n_keys, dtype=torch.float64, clock=clocks.CPU)
    assert retrieval._inexactness(exact, few) is None
    released, ours = exact("released"), exact("factored")
    sequence = released_retrieval.draw_evaluation(data, np.random.RandomState(3))
    keys, values, queries, targets = (x[0] for x in sequence)
    chunks = retrieval_loss(ours.model(keys[:1], values[:1], queries.T), targets.T)[0].split(5)
    found = released.evaluate(sequence, 5)
    torch.testing.assert_close(found, torch.stack([chunk.mean() for chunk in chunks]).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("row", retrieval.ROWS)
def test_what_the_released_formulation_computes_in_vain_learns_nothing(row: str) -> None:
    attention = retrieval.ROWS[row]
    data = RetrievalData(n_keys=5, replacement=attention.rule != "sum", batch_size=4, steps_per_block=1, seed=0)
    released = retrieval.trainer_of(attention, 5, "released", torch.float32, clocks.CPU)
    called: list[torch.Size] = []
    released.model.to_forget.register_forward_hook(lambda _map, _pairs, result: called.append(result.shape))
    released.take(data.block(0))
    assert called == [(4, data.length, 64)]
    vain = {"to_value.weight", "to_value.bias", "to_forget.weight", "to_forget.bias", "values.weight"}
    if attention.rule == "sum":
        vain |= {"to_beta.weight", "to_beta.bias"}
    assert {name for name, parameter in released.model.named_parameters() if parameter.grad is None} == vain
    # nodes that outlive their step scatter what the next one allocates
    assert isinstance(released, released_retrieval.ReleasedTrainer)
    assert released.latest.grad_fn is not None


@pytest.mark.parametrize("row", ["DPFP-3", "Linear delta"])
def test_a_released_formulation_with_other_gradients_gets_no_number(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = released_retrieval.ReleasedModel.forward

    def forward(self: released_retrieval.ReleasedModel, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        # the same predictions, a little less of their gradient
        y = honest(self, keys, values, queries)
        return y - 1e-6 * (y - y.detach())

    monkeypatch.setattr(released_retrieval.ReleasedModel, "forward", forward)
    monkeypatch.setattr(retrieval, "ROWS", {row: retrieval.ROWS[row]})
    told: list[str] = []
    ((_, measurements),) = retrieval.measure_retrieval(settings(told), None)
    assert "released" not in [measurement.backend for measurement in measurements]
    assert any(line.startswith(f"released is not measured for {row} at S=5: its dL/d") for line in told)


@pytest.mark.parametrize("replacement", [False, True])
def test_the_released_data_are_of_the_task(replacement: bool) -> None:
    data = RetrievalData(n_keys=6, replacement=replacement, seed=0)
    keys, values, query, target = (x[0] for x in released_retrieval.draw_step(data, np.random.RandomState(3)))
    assert keys.shape == values.shape == (32, data.length)
    for ks, vs, q, t in zip(keys.tolist(), values.tolist(), query[:, 0].tolist(), target[:, 0].tolist(), strict=True):
        assert q in ks
        assert dict(zip(ks, vs, strict=True))[q] == t
        if not replacement:
            assert sorted(ks) == sorted(vs) == list(range(6))


@pytest.mark.parametrize("max_queries", [0, 3])
@pytest.mark.parametrize("replacement", [False, True])
def test_the_released_evaluation_asks_for_every_key_of_a_sequence(replacement: bool, max_queries: int) -> None:
    data = RetrievalData(n_keys=9, replacement=replacement, max_queries=max_queries, seed=0)
    keys, values, query, target = (x[0] for x in released_retrieval.draw_evaluation(data, np.random.RandomState(3)))
    # S pairs in both settings, the same for every query
    ks, vs = keys[0].tolist(), values[0].tolist()
    assert len(ks) == 9
    assert (keys == keys[0]).all()
    assert (values == values[0]).all()
    asked = sorted(set(ks))[: max_queries or None]
    assert query[:, 0].tolist() == asked
    assert target[:, 0].tolist() == [dict(zip(ks, vs, strict=True))[key] for key in asked]
    assert len(keys) == len(values) == len(asked)


def test_drawing_is_in_the_time_of_the_released_formulation(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Recorded(clocks.Clock):
        def seconds(self, function: clocks.Function) -> float:
            done.append("begin")
            function()
            return float(done.count("begin"))

    for name in ("draw_step", "draw_evaluation"):
        monkeypatch.setattr(released_retrieval, name, recorded(name, getattr(released_retrieval, name), done))
    for name in ("take", "evaluate"):
        owner = released_retrieval.ReleasedTrainer
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name), done))
    data = RetrievalData(n_keys=5, steps_per_block=10, evaluation_sequences=4, seed=0)
    clock = Recorded("recorded", lambda: 0.0)
    trainer = retrieval.trainer_of(retrieval.ROWS["Linear"], 5, "released", torch.float32, clock)
    # 1 "second" a step, 2 a sequence of the evaluation
    assert trainer.seconds_a_step(data, 0) == pytest.approx(1 + 2 * 4 / 10)
    assert done == ["begin", "draw_step", "take", "begin", "draw_evaluation", "evaluate"]


def recorded(name: str, function: Callable[..., object], done: list[str]) -> Callable[..., object]:
    def call(*arguments: object) -> object:
        done.append(name)
        return function(*arguments)

    return call


def test_each_size_of_the_task_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(retrieval.ROWS)
    told: list[str] = []
    # this process would have nothing to measure
    monkeypatch.setattr(retrieval, "ROWS", {})
    found = list(retrieval.measure_retrieval(rules.Settings("cpu", 1, told.append), [2, 3]))
    assert [(group.rule, group.shape) for group, _ in found] == [(row, f"S={s}") for s in (2, 3) for row in rows]
    assert all(measurement.spread.rounds == 1 for _, measurements in found for measurement in measurements)
    assert not [line for line in told if "Linear" in line]


def end_process(n_keys: int, rounds: int) -> None:
    os._exit(1)


def test_a_size_whose_process_is_ended_is_told_and_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(retrieval, "_measured_alone", end_process)
    assert not list(retrieval.measure_retrieval(rules.Settings("cpu", 1, told.append), [2]))
    assert told == ["retrieval is not measured at S=2: its process was ended"]


def test_a_row_is_measured_with_the_released_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # what experiments/figure5.yaml says of its rows is what is measured
    experiment = load_experiment("figure5", Project(ROOT))
    told = {
        row: overrides["data.batch_size"]
        for row, overrides in experiment.protocols["released"].rows.items()
        if "data.batch_size" in overrides
    }
    assert told == retrieval.BATCH_SIZES
    sizes: set[int] = set()
    honest = retrieval.Trainer.seconds_a_step

    def seconds_a_step(self: retrieval.Trainer, data: RetrievalData, number: int) -> float:
        sizes.add(data.batch_size)
        return honest(self, data, number)

    monkeypatch.setattr(retrieval.Trainer, "seconds_a_step", seconds_a_step)
    monkeypatch.setattr(retrieval, "ROWS", {"Schlag (2021)": retrieval.ROWS["Schlag (2021)"]})
    assert list(retrieval.measure_retrieval(settings([]), None))
    assert sizes == {128}


def test_a_decoder_that_forgets_its_state_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoding.decoder_of(decoding.ATTENTIONS["delta"])
    assert decoding._disagreement(decoder) is None
    forgetful = decoding.decoder_of(decoding.ATTENTIONS["delta"])
    read = forgetful.read

    def read_anew(words: list[int]) -> Tensor:
        forgetful.state = None
        return read(words)

    monkeypatch.setattr(forgetful, "read", read_anew)
    assert decoding._disagreement(forgetful)


def test_a_language_model_with_other_losses_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = training.Trainer.update

    def update(self: training.Trainer, words: Tensor) -> float:
        loss = honest(self, words)
        return loss + 0.01 * (self.model.blocks[0].attention.memory.config.backend == "auto")

    monkeypatch.setattr(training.Trainer, "update", update)
    told: list[str] = []
    results = list(training.measure_training(settings(told)))
    assert [group.rule for group, _ in results] == list(training.ROWS)
    assert [[m.backend for m in measurements] for _, measurements in results] == [["reference"]] * len(results)
    assert told[0].startswith("auto is not measured for Linear Transformer at quick: its losses are off by 1.0e-02")


def test_language_models_are_measured_at_the_sizes_of_table_2() -> None:
    for profile, size in training.SIZES.items():
        run = resolve_runs(load_experiment("table2", Project(ROOT)), profile=profile)[0]
        model, data = run.config["model"]["init_args"], run.config["data"]["init_args"]
        assert dataclasses.asdict(size.architecture) == {**model["architecture"], "dropout": 0.0}
        assert (size.batch, size.length) == (data["batch_size"], data["length"])
        known = KNOWN_CORPORA.get(data["corpus"])
        assert size.n_words == (known.vocabulary_size if known else 1 + len(LEXICON))


# --- measuring -------------------------------------------------------------------------------------------------------


def test_growth_tells_time_and_memory() -> None:
    results = list(rules.measure_growth(settings([])))
    assert [group.shape for group, _ in results] == ["B1 H4 T16 32x32", "B1 H4 T64 32x32"]
    for _, measurements in results:
        assert all(0 < m.spread.low <= m.spread.median <= m.spread.high for m in measurements)


def test_peak_memory_is_that_of_the_call() -> None:
    found = needed_memory_mb(lambda: torch.ones(2**24), "cpu")
    if found is None:
        pytest.skip("this system does not say what a process needed at its peak")
    # pages of the interpreter come on top
    assert 60 < found < 100


def test_who_is_slow_is_measured_less_often() -> None:
    class Steps(clocks.Clock):
        def seconds(self, function: clocks.Function) -> float:
            return float(function())  # type: ignore[arg-type]

    found = clocks.interleaved({"slow": lambda: 2.0, "quick": lambda: 0.1}, Steps("steps", lambda: 0.0), rounds=5)
    assert found == {"slow": Spread(2.0, 2.0, 2.0, 3), "quick": Spread(0.1, 0.1, 0.1, 5)}


def test_arithmetic_is_counted_a_token_and_head() -> None:
    one = SHAPES["S1"].batch * SHAPES["S1"].steps * SHAPES["S1"].heads * 16 * 16 / 1e9
    assert gigaflop("delta", SHAPES["S1"], "forward+backward") == pytest.approx(22 * one)
    assert gigaflop("sum", SHAPES["S1"], "forward") == pytest.approx(4 * one)


def test_the_large_shape_is_for_gpus_unless_it_is_named() -> None:
    assert [shape.name for shape in shapes_for(None, "cpu")] == ["S1", "S2", "S3", "S4", "P1", "P2"]
    assert shapes_for(None, "cuda")[-1].name == "M"
    assert str(shapes_for(["M"], "cpu")[0]) == "M B8 H16 T4096 128x128"


# --- what is written and read ----------------------------------------------------------------------------------------


def lines(group: Group, **milliseconds: float) -> list[dict[str, str]]:
    found = [
        Measurement(name, Spread(x / 1000, 0.9 * x / 1000, 1.2 * x / 1000, 5), 2.0 if name == "gemm" else 1.0, 3.0)
        for name, x in milliseconds.items()
    ]
    return records.rows_of(group, found, MACHINE, ORIGIN)


DELTA = Group("rules", "delta", "S1 B8 H8 T256 16x16", "float32", 1, "cpu", "forward+backward")
GROWTH = [Group("growth", "delta", f"B1 H4 T{t} 32x32", "float32", 1, "cpu", "forward+backward") for t in (1024, 256)]
RETRIEVAL = Group("retrieval", "DPFP-1", "S=100", "float32", 1, "cpu", "step")


def write(root: Path) -> Path:
    path = root / "results" / "benchmarks" / "cpu.csv"
    records.save(path, lines(DELTA, reference=100.0, cpu=2.0, chunked=8.0, gemm=2.0))
    for group in GROWTH:
        records.save(path, lines(group, cpu=1.5, sdpa=30.0))
    records.save(path, lines(RETRIEVAL, released=75.0, plain=50.0, compiled=0.5))
    return path


def test_what_is_saved_is_read_and_a_comparison_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert path.read_text().splitlines()[0] == ",".join(BENCHMARK_COLUMNS)
    rows = read_benchmarks(path)
    assert len(rows) == 11
    (cpu,) = (row for row in rows if (row["part"], row["backend"]) == ("rules", "cpu"))
    assert [cpu[x] for x in ("milliseconds", "low", "high", "gigaflop", "git_commit")] == [
        *("2", "1.8", "2.4", "1", "abcdef0123456789"),
    ]
    before = path.read_bytes()
    # chunked fails its check this time: its old number, measured beside other ones, goes
    records.save(path, lines(DELTA, reference=90.0, cpu=2.0))
    names = [row["backend"] for row in read_benchmarks(path) if row["part"] == "rules"]
    assert names == ["reference", "cpu"]
    records.save(path, lines(DELTA, reference=100.0, cpu=2.0, chunked=8.0, gemm=2.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (",2,1.8,2.4,", ",-2,1.8,2.4,", "milliseconds '-2' is no number above 0"),
        ("2026-01-31", "today", "date 'today' is no date such as 2026-01-31"),
        ("backend,", "who,", "lacks the column 'backend'"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    old: str, new: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace(old, new, 1))
    assert report(["bench", "--root", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert "run `fwp bench`" in line


def test_readme_has_what_the_csv_gives(tmp_path: Path) -> None:
    write(tmp_path)
    text = benchmarks.block(tmp_path)
    assert text.startswith("Some CPU (2 cores, v3), 2026-01-31, torch 2.13, commit abcdef012, `fwp bench`.")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["", "`cpu`, ms", "of gemm", "loop over time steps", "`chunked`"]
    # 1 of 2 ms against 2 of 2 ms; 100 / 2; 8 / 2
    assert cells[2] == ["delta, S1 B8 H8 T256 16x16", "2.00 (1.80 to 2.40)", "50 %", "50x", "4.0x"]
    # by length, not by letters
    assert cells[3] == ["", "T = 256", "T = 1024"]
    assert cells[5] == ["`cpu`", "1.50 / 3.00", "1.50 / 3.00"]
    assert cells[-1] == ["DPFP-1", "2,000 (150x, 100x)"]


def test_readme_has_words_a_second_and_how_many_times_those_of_the_loop(tmp_path: Path) -> None:
    path = tmp_path / "results" / "benchmarks" / "cpu.csv"
    for size in ("short B8 T256", "smoke B16 T64"):
        group = Group("training", "Delta Network", size, "float32", 1, "cpu", "update")
        records.save(path, lines(group, reference=400.0, auto=20.0))
    text = benchmarks.block(tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["", "short B8 T256", "smoke B16 T64"]
    # 8 x 256 and 16 x 64 words in 20 ms
    assert cells[-1] == ["Delta Network", "102,400 (20x)", "51,200 (20x)"]


def test_readme_of_this_project_is_that_of_its_csv() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(f"{benchmarks.BEGIN}\n(.*)\n{benchmarks.END}", text, flags=re.S)
    assert found
    assert found[1] == benchmarks.block(ROOT)


def test_the_figure_is_the_same_file_each_time(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "experiments").mkdir()
    images = []
    for _ in range(2):
        assert report(["bench", "--root", str(tmp_path)]) == 0
        folder = tmp_path / "reports" / "output" / "bench"
        images.append([(folder / name).read_bytes() for name in ("cpu.png", "cpu.pdf")])
        shutil.rmtree(folder)
    assert images[0] == images[1]


def test_a_figure_before_any_measurement_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(["bench", "--root", str(tmp_path)]) == 2
    assert "run `make bench` first" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "experiments").mkdir()
    monkeypatch.setenv("FWP_ROOT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--parts", "rule"], "--parts rule: unknown part 'rule'. Did you mean 'rules'?"),
        (["--shapes", "S9"], "--shapes S9: unknown shape 'S9'."),
        (["--device", "tpu"], "--device tpu: unknown device."),
        (["--sizes", "20,x"], "'x' is no whole number from 1"),
        (["--rounds", "0"], "'0' is no whole number from 1"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    arguments: list[str], sentence: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_gpu_that_is_not_there_is_one_sentence(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fwp: error: --device cuda cannot be measured here: ")


def test_the_command_prints_ratios_and_saves_unless_told_not_to(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)
    assert main(["bench", "--quick", "--parts", "rules"]) == 0
    printed = capsys.readouterr().out
    assert "rules: delta, Q B1 H2 T40 8x8, forward+backward, float32, 1 thread, cpu time" in printed
    assert re.search(r"reference +[\d.]+ ms .* 1\.0x", printed)
    assert not (project / "results").exists()
    monkeypatch.setattr(
        bench.rules, "measure_growth", lambda _: iter([(DELTA, [Measurement("cpu", Spread(1, 1, 1, 1))])])
    )
    request = Request(parts=["growth"])
    assert bench.run(request, Project(project), ORIGIN, lambda _: None) == 0
    assert [row["backend"] for row in read_benchmarks(project / "results" / "benchmarks" / "cpu.csv")] == ["cpu"]


def test_peers_that_are_not_here_are_told_of_and_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FWP_CACHE", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: pytest.fail("nothing is fetched unasked"))
    for name in list(peers.sys.modules):
        if name.startswith("idiap_"):
            monkeypatch.delitem(peers.sys.modules, name)
    told: list[str] = []
    found = peers.peers_of("sum", "cpu", torch.float32, fetch=False, tell=told.append)
    assert [candidate.name for candidate in found] == ["sdpa"]
    assert [line.split(" is not measured")[0] for line in told] == list(peers.IDIAP_FLAGS)
    assert "`fwp bench --peers` fetches and builds it" in told[0]


def test_the_figure_is_among_the_reports_that_are_checked(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    write(tmp_path)
    assert report(["bench", "--root", str(tmp_path)]) == 0
    assert list(check_reports(Project(tmp_path))) == []
    figure = tmp_path / "reports" / "output" / "bench" / "cpu.png"
    figure.write_bytes(figure.read_bytes() + b" ")
    assert list(check_reports(Project(tmp_path))) == [
        "reports/output/bench/cpu.png is not what results/*.csv gives; run `python -m reports`"
    ]
