"""Runs on texts: resumed bit for bit within a pass through the text, known by what they read and not by where it is."""

from __future__ import annotations

import copy
import csv
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

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
  paper: {set: {
    <<: *small,
    data: {corpus: folder, length: 16, batch_size: 4, accumulation: 2, steps_per_block: 10, evaluation_batch_size: 2}}}
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


# --- what a user may get wrong ----------------------------------------------------------------------------------------

EVERY = " ".join(f"w{i}" for i in range(30))
SOME = " ".join(f"w{i % 30}" for i in range(40))
GOOD = {"train.txt": f"{EVERY}\n" * 10, "valid.txt": SOME, "test.txt": SOME}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("fwp: error: ")
    return error


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"valid.txt": None}, "has no valid.txt"),
        (
            {"train.txt": None, "train.txt.gz": gzip.compress(SOME.encode())[:-9]},
            "train.txt.gz is truncated or damaged",
        ),
        ({"train.txt": f"{EVERY}\n" + "\n" * 500}, "500 of 501 lines are empty, and each would count as a token"),
        ({"test.txt": f"{SOME}\nw1 zebra w2 yak\n"}, "test.txt, line 2: the word 'zebra' is not in the training text"),
        ({"train.txt": EVERY}, "the train text is too short: its 31 tokens make 4 streams of 7"),
        ({"valid.txt": "w1 w2 " * 15}, "the valid text is too short: its 31 tokens make 2 streams of 15"),
        ({"test.txt": "w1 w2"}, "the test text is too short: its 3 tokens make one stream, and a segment with its"),
    ],
    ids=["missing", "truncated", "empty lines", "unknown word", "short train", "short valid", "short test"],
)
def test_a_text_that_cannot_be_used_is_one_sentence_before_anything_trains(
    files: dict[str, Any], said: str, language: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "text", {name: text for name, text in {**GOOD, **files}.items() if text is not None})
    arguments = ["sweep", "language", "--profile", "paper", "--rows", "Delta Network", "--data", str(folder)]
    assert main([*arguments, "--dry-run"]) == 2
    assert said in the_error(capsys)
    assert not (language.root / "runs").exists()


def test_a_text_that_is_not_the_corpus_it_is_called_is_one_sentence(
    language: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language.edit("language", "corpus: folder", "corpus: wikitext-2")
    arguments = ["--profile", "paper", "--rows", "Delta Network", "--data", str(write(tmp_path / "text", GOOD))]
    assert main(["sweep", "language", "--dry-run", *arguments]) == 2
    assert "train has 310 tokens in 10 lines, WikiText-2 has 2,088,628 in 36,718; fetch it with" in the_error(capsys)


def test_a_checkpoint_of_something_else_is_one_sentence(
    language: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = language.runs("language", profile="paper", rows=["Delta Network"])
    run.config["data"]["init_args"]["directory"] = str(write(tmp_path / "text", GOOD))
    run.config["model"]["init_args"]["max_steps"] = 20

    def config(name: str, model: dict[str, Any] | None = None, directory: Path | None = None) -> str:
        changed = copy.deepcopy(run.config)
        changed["model"]["init_args"]["architecture"] |= model or {}
        changed["data"]["init_args"] |= {"directory": str(directory)} if directory else {}
        (tmp_path / name).write_text(yaml.safe_dump(changed), encoding="utf-8")
        return str(tmp_path / name)

    assert main(["fit", "--config", config("fitted.yaml")]) == 0
    (last,) = (language.root / "runs").glob("*/last.ckpt")
    assert main(["test", "--config", config("fitted.yaml"), "--ckpt_path", str(last)]) == 0
    capsys.readouterr()

    def said(command: str, name: str, checkpoint: Path, **changes: Any) -> str:
        assert main([command, "--config", config(name, **changes), "--ckpt_path", str(checkpoint)]) == 2
        return the_error(capsys)

    wider = said("validate", "wider.yaml", last, model={"d_model": 32})
    assert "is of another configuration: model.words.weight is [31, 16] in it and [31, 32] here" in wider
    deeper = said("test", "deeper.yaml", last, model={"n_layers": 3})
    assert "model.blocks.2.attention.W_q.weight is absent in it and [16, 16] here" in deeper
    final = said("test", "fitted.yaml", last.with_name("final.ckpt"))
    assert "it is a final.ckpt, which `fwp generate` reads; name a last.ckpt that `fwp fit` left behind" in final
    (tmp_path / "damaged.ckpt").write_bytes(last.read_bytes()[:1000])
    assert "damaged.ckpt: it " in said("test", "fitted.yaml", tmp_path / "damaged.ckpt")
    # as many words, but others
    other = write(tmp_path / "other", {name: text.replace("w1 ", "v1 ") for name, text in GOOD.items()})
    changed = said("test", "other.yaml", last, directory=other)
    assert "the checkpoint is of a model of another text" in changed

    def run_out(self: LanguageModelingTask, *arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(LanguageModelingTask, "training_step", run_out)
    assert main(["fit", "--config", config("fitted.yaml")]) == 2
    assert "memory ran out (it asked for 2.00 GiB); lower data.batch_size" in the_error(capsys)


def test_a_language_model_that_explodes_is_recorded_as_diverged(train: Callable[..., Any], language: Any) -> None:
    language.edit("language", "model.lr: 1e-2", "model.lr: 1e30")
    outcome = train(language.runs("language", rows=["Delta Network"])[0])
    assert outcome.status == "diverged"
    assert outcome.message == "the training loss is nan in the block before step 10"
