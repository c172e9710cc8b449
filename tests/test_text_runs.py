"""Runs on texts: resumed bit for bit within a pass through the text, known by what they read and not by where it is."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fwp_lightning.cli import main
from fwp_lightning.results import read_points, read_store
from fwp_lightning.sweep.workers import import_file
from fwp_lightning.tasks.language_modeling import LanguageModelingTask

ROOT = Path(__file__).resolve().parent.parent
TEXT_TASK = Path(__file__).resolve().parent / "text_task.py"
BASE = """
seed_everything: 1
trainer:
  {accelerator: cpu, devices: 1, precision: 32-true, max_epochs: 6, num_sanity_val_steps: 0, log_every_n_steps: 5,
   accumulate_grad_batches: 2}
model: {class_path: text_task.PairsTask, init_args: {learning_rate: 0.1}}
data:
  class_path: fwp_lightning.data.wikitext.WikiTextData
  init_args: {corpus: folder, directory: null, length: 5, batch_size: 4, accumulation: 2, steps_per_block: 3,
              evaluation_batch_size: 2, n_tokens: 1000}
"""
EXPERIMENT = """
title: Words
base: base/words.yaml
seeds: [1]
rows: {pairs: {}, generated: {data.corpus: facts}}
protocols: {released: {version: 1}}
profiles: {smoke: {rows: [pairs]}, short: {rows: [generated]}, paper: {rows: [pairs], set: {trainer.max_epochs: 8}}}
"""


@pytest.fixture
def words(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with an experiment on texts."""
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    tracked.write("base/words", BASE)
    tracked.write("words", EXPERIMENT)
    import_file(str(TEXT_TASK))
    return tracked


def put(folder: Path, seed: int = 1) -> Path:
    """A text of 30 words: 110 training tokens are 27 for each of 4 streams, so that a pass takes 6 steps of 5."""
    folder.mkdir(exist_ok=True)
    draws = torch.randint(30, (109,), generator=torch.Generator().manual_seed(seed)).tolist()
    every = " ".join(f"w{i}" for i in range(30))
    for split, numbers in {"train": draws, "valid": draws[:39], "test": draws[:20]}.items():
        text = " ".join(f"w{i}" for i in numbers)
        (folder / f"{split}.txt").write_text(f"{every}\n{text}" if split == "train" else text, encoding="utf-8")
    return folder


def with_text(run: Any, folder: Path) -> Any:
    from fwp_lightning.data.corpora import hashes_of_folder
    from fwp_lightning.experiment import with_texts

    return with_texts([run], str(folder), hashes_of_folder)[0]


def points(client: Any, run: Any) -> set[Any]:
    (stored,) = [stored for stored in read_store(client) if stored.run_key == run.run_key]
    return set(read_points(client, [stored.run_id])[stored.run_id])


def test_a_run_stopped_within_a_pass_through_the_text_reads_on_where_it_was(
    train: Callable[..., Any], words: Any, client: Any, tmp_path: Path
) -> None:
    folder = put(tmp_path / "text")
    run = with_text(words.runs("words")[0], folder)
    twin = with_text(words.runs("words", profile="paper")[0], folder)
    for _ in range(4):
        assert train(run, stop=lambda: 0.0).status == "stopped"
    assert train(run).status == "complete"
    # the same training under another key, undisturbed, which goes on for longer
    assert train(twin).status == "complete"
    found = points(client, run)
    assert len([point for point in found if "read" in str(point)]) == 6
    assert found < points(client, twin)


def sweep(*arguments: str) -> int:
    return main(["sweep", "words", "--jobs", "1", "--import", str(TEXT_TASK), *arguments])


def runs_csv(words: Any) -> list[dict[str, str]]:
    with (words.root / "results" / "runs.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_folder_is_no_part_of_a_run_and_the_text_is(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--data", str(put(tmp_path / "here"))) == 0
    (first,) = runs_csv(words)
    assert len(first["data_sha256"]) == 64
    assert "here" not in " ".join(value for key, value in first.items() if key != "command")
    assert str(tmp_path) not in " ".join(first.values())
    capsys.readouterr()

    def done(folder: Path) -> str:
        assert main(["status", "words", "--data", str(folder), "--import", str(TEXT_TASK)]) == 0
        return capsys.readouterr().out

    # the same text elsewhere is the same run
    assert "1/1" in done(put(tmp_path / "there"))
    # another text in the same place is another run, of the same configuration
    assert "0/1" in done(put(tmp_path / "here", seed=2))
    before, after = (with_text(words.runs("words")[0], tmp_path / name) for name in ("there", "here"))
    assert first["run_key"] == before.run_key != after.run_key
    assert first["config_sha256"] == before.config_sha256 == after.config_sha256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "data.corpus=folder needs data.directory"),
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--data", ".", "--profile", "short"], "data.corpus=facts is generated and reads no folder"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_sentence_before_anything_trains(
    arguments: list[str], said: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(put(tmp_path / "text"))
    assert sweep("--dry-run", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_folder_for_runs_that_read_none_is_refused(words: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "toy", "--data", "somewhere", "--dry-run"]) == 2
    assert "--data somewhere: none of these runs reads a text" in capsys.readouterr().err


def test_a_segment_longer_than_the_text_is_found_before_anything_trains(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words.edit("base/words", "length: 5", "length: 50")
    assert sweep("--dry-run", "--data", str(put(tmp_path / "text"))) == 2
    assert "the train text is too short: its 141 tokens make 4 streams of 35" in capsys.readouterr().err


# --- a language model -------------------------------------------------------------------------------------------------

LANGUAGE = """
title: Words, carried
base: base/lm_small.yaml
seeds: [1]
rows:
  Delta Network: {model.attention: {rule: delta, feature_map: elu, phi_norm: sum}}
  Performer delta:
    model.attention: {rule: delta, feature_map: favor, phi_norm: sum, favor: {redraw: never}}
profiles:
  smoke: {set: &small {
    trainer.accelerator: cpu, trainer.check_val_every_n_epoch: 2, trainer.accumulate_grad_batches: 2,
    model.architecture: {n_layers: 2, d_model: 16, n_heads: 2, d_ff: 16, cutoffs: [40, 200], positions: none},
    model.context: carried, model.evaluation.kind: segments, model.warmup_steps: 5, model.max_steps: 40, model.lr: 1e-2,
    data: {corpus: facts, n_tokens: 3000, length: 16, batch_size: 4, accumulation: 2, steps_per_block: 10,
           evaluation_batch_size: 2}}}
  # the same training under another key
  short: {set: *small}
"""


@pytest.fixture
def language(tracked: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with an experiment on language models that are trained in a second."""
    monkeypatch.setenv("FWP_ROOT", str(tracked.root))
    shutil.copy(ROOT / "experiments" / "base" / "lm_small.yaml", tracked.root / "experiments" / "base")
    tracked.write("language", LANGUAGE)
    return tracked


class Killed(Exception):
    """As of a process that ends within a block."""


def left_behind(language: Any, run: Any) -> dict[str, torch.Tensor]:
    folder = language.root / "runs" / run.run_key
    return dict(torch.load(folder / "final.ckpt", weights_only=True)["weights"])


@pytest.mark.parametrize("row", ["Delta Network", "Performer delta"])
def test_a_model_that_is_killed_within_a_block_ends_bit_for_bit_as_one_that_is_not(
    row: str, train: Callable[..., Any], language: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,), (twin,) = (language.runs("language", profile=profile, rows=[row]) for profile in ("smoke", "short"))
    assert run.config == twin.config
    end_of_batch = LanguageModelingTask.on_train_batch_end

    def kill_at(step: int) -> None:
        def on_train_batch_end(self: LanguageModelingTask, *arguments: Any) -> None:
            end_of_batch(self, *arguments)
            if self.trainer.global_step == step:
                raise Killed

        monkeypatch.setattr(LanguageModelingTask, "on_train_batch_end", on_train_batch_end)

    # in the second block, then in the fourth, which is trained anew from its start
    for step in (17, 33):
        kill_at(step)
        assert train(run, checkpoint_seconds=0.0).message.startswith("Killed")
        assert (language.root / "runs" / run.run_key / "last.ckpt").is_file()
    monkeypatch.setattr(LanguageModelingTask, "on_train_batch_end", end_of_batch)
    assert train(run).status == train(twin).status == "complete"
    ours, undisturbed = left_behind(language, run), left_behind(language, twin)
    assert ours.keys() == undisturbed.keys()
    for name, weights in undisturbed.items():
        assert torch.equal(ours[name], weights), name
    assert points(client, run) == points(client, twin)
