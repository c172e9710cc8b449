"""Translation in Lightning: fairseq's numbers, its data read and checked, evaluation of every sentence, resuming."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from fwp_lightning.attention import AttentionConfig
from fwp_lightning.cli import main
from fwp_lightning.data.corpora import hashes_of_folder
from fwp_lightning.data.grammar import ADJECTIVES, NOUNS, TENSES, sentence_pairs
from fwp_lightning.data.parallel_text import CORPORA, Pairs, Selection, read_corpus
from fwp_lightning.data.translation import TranslationData
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project, load_experiment, resolve_runs
from fwp_lightning.results_csv import TRANSLATION_COLUMNS
from fwp_lightning.sweep.cost import measure
from fwp_lightning.tasks.translation import EncoderDecoder, Search, TranslationTask, bleu, compound_split_bleu
from fwp_lightning.translation import compatibility

ROOT = Path(__file__).resolve().parent.parent
MISSING = compatibility.why_unavailable()
needs_fairseq = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

DELTA = AttentionConfig("delta", "elu", phi_norm="sum", key_norm_eps=1e-6, query_norm_eps=1e-6)
TINY = EncoderDecoder(n_layers=1, d_model=32, n_heads=2, d_ff=32, dropout=0.0)
SEARCH = Search(beam=2, max_length_a=1.0, max_length_b=5)


class RecordingTask(TranslationTask):
    """Keeps what it logs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.logged: dict[str, list[float]] = {}

    def _log(self, name: str, value: float, n: int = 1) -> None:
        self.logged.setdefault(name, []).append(value)
        super()._log(name, value, n)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, so that what is prepared goes into its folder."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setenv("FWP_ROOT", str(tmp_path))
    return tmp_path


def data(**options: Any) -> TranslationData:
    settings = {"n_pairs": 240, "max_tokens": 300, "steps_per_block": 5, "max_length": 64, **options}
    return TranslationData(**settings)


def task(attention: AttentionConfig = DELTA, **options: Any) -> RecordingTask:
    settings = {"lr": 3e-3, "warmup_steps": 4, "max_steps": 10, **options}
    L.seed_everything(3, verbose=False)
    return RecordingTask(attention, TINY, SEARCH, **settings)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    sizes = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return L.Trainer(default_root_dir=folder, **{**quiet, **sizes, **options})


# the same numbers as fairseq's


def losses_of_fairseq_train(caplog: pytest.LogCaptureFixture, folder: str, *options: str) -> list[float]:
    """The loss of each update, in three digits, of fairseq-train with the settings of `task` and `data`."""
    sizes = [f"--{part}-{name}" for part in ("encoder", "decoder") for name in
             ("layers=1", "embed-dim=32", "ffn-embed-dim=32", "attention-heads=2")]  # fmt: skip
    arguments = [
        folder, "--arch=fwp_delta", *sizes, "--share-all-embeddings", "--cpu", "--seed=3", "--max-tokens=300",
        "--optimizer=adam", "--adam-betas=(0.9, 0.98)", "--lr=3e-3", "--lr-scheduler=inverse_sqrt",
        "--warmup-updates=4", "--warmup-init-lr=1e-7", "--criterion=label_smoothed_cross_entropy",
        "--label-smoothing=0.1", "--log-interval=1", "--log-format=json", "--max-source-positions=64",
        "--max-target-positions=64", *options,
    ]  # fmt: skip
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main(["fairseq-train", *arguments]) == 0
    return [float(json.loads(r.getMessage())["loss"]) for r in caplog.records if r.name == "train_inner"]


@needs_fairseq
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_loss_curve_is_that_of_fairseq_train(
    project: Path, caplog: pytest.LogCaptureFixture, accumulation: int, dropout: float
) -> None:
    ours, corpus = task(), data(accumulation=accumulation)
    ours.architecture = EncoderDecoder(1, 32, 2, 32, dropout=dropout)
    trainer(project).fit(ours, corpus)
    options = [f"--dropout={dropout}", f"--update-freq={accumulation}", "--max-update=10", "--no-save"]
    theirs = losses_of_fairseq_train(caplog, str(corpus.folder), *options)
    assert len(theirs) == len(ours.logged["train/loss"]) == 10
    # fairseq prints three digits
    assert [round(loss, 3) for loss in ours.logged["train/loss"]] == pytest.approx(theirs, abs=1.001e-3)


@needs_fairseq
def test_every_update_is_divided_by_its_own_tokens(project: Path) -> None:
    # one update of three micro-batches is that of all their sentences at once
    corpus = data(accumulation=3)
    split = task(max_steps=5)
    corpus.seed = 3
    corpus.setup("fit")
    samples = corpus.training_batches(0)
    assert len({sample["ntokens"] for sample in samples}) > 1
    trainer(project).fit(split, data(accumulation=3))
    model = task().build_model(corpus)
    from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion

    criterion = LabelSmoothedCrossEntropyCriterion(corpus.task, False, 0.1)
    sums = [criterion(model, sample) for sample in samples]
    expected = sum(float(loss.detach()) for loss, *_ in sums) / sum(n for _, n, _ in sums) / math.log(2)
    assert split.logged["train/loss"][0] == pytest.approx(expected, rel=1e-5)


@needs_fairseq
def test_learning_rate_is_fairseqs(project: Path) -> None:
    from fairseq.optim.adam import Adam
    from fairseq.optim.lr_scheduler.inverse_square_root_schedule import InverseSquareRootSchedule

    class Optimizer:
        optimizer = Adam([torch.nn.Parameter(torch.zeros(1))])
        lr = 0.0

        def set_lr(self, lr: float) -> None:
            self.lr = lr

    from argparse import Namespace

    optimizer = Optimizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InverseSquareRootSchedule.__mro__[1], "__init__", lambda self, cfg, opt: None)
        InverseSquareRootSchedule.cfg = cfg = Namespace(warmup_updates=4, warmup_init_lr=1e-7, lr=[3e-3])
        InverseSquareRootSchedule.optimizer = optimizer
        schedule = InverseSquareRootSchedule(cfg, optimizer)
        ours = task()
        assert ours.learning_rate(0) == pytest.approx(optimizer.lr)
        for done in range(1, 12):
            schedule.step_update(done)
            assert ours.learning_rate(done) == pytest.approx(optimizer.lr)


@needs_fairseq
def test_resumed_run_is_the_undisturbed_one(project: Path) -> None:
    whole = task(AttentionConfig("sum", "favor", attention_norm="readout", n_features=4), max_steps=10)
    trainer(project).fit(whole, data())
    first = task(whole.attention, max_steps=5)
    run = trainer(project)
    run.fit(first, data())
    run.save_checkpoint(project / "five.ckpt")
    second = task(whole.attention, max_steps=10)
    trainer(project).fit(second, data(), ckpt_path=project / "five.ckpt", weights_only=True)
    assert second.logged["train/loss"] == whole.logged["train/loss"][5:]
    assert second.tokens == whole.tokens > 0
    assert second._best_bleu == whole._best_bleu


@needs_fairseq
def test_all_sentences_are_translated_with_the_best_weights(project: Path) -> None:
    found, run, corpus = task(max_steps=10), trainer(project), data()
    run.fit(found, corpus)
    assert found._best is not None
    best = {name: x.clone() for name, x in found._best.items()}
    # later weights must not be those that translate
    for parameter in found.model.parameters():
        parameter.data.zero_()
    run.test(found, corpus, verbose=False)
    # fairseq's position tables hold a buffer of one element that is never written
    now = {name: x for name, x in found.model.state_dict().items() if not name.endswith("_float_tensor")}
    assert all(torch.equal(best[name], x) for name, x in now.items())
    translations = found._translations
    assert {split: len(texts) for split, texts in translations.items()} == {"valid": 12, "test": 13}
    expected = bleu([translations["test"][i] for i in range(13)], corpus.references("test"))[0]
    assert found.logged["test/bleu"] == [pytest.approx(expected)]
    assert (project / "translations.txt").read_text().count("translation  ") == 10


@needs_fairseq
def test_training_goes_on_with_dropout_after_a_validation(project: Path) -> None:
    class Watching(RecordingTask):
        modes: list[bool]

        def training_step(self, samples: Any, batch_idx: int) -> None:
            self.modes = [*getattr(self, "modes", []), self.model.encoder.layers[0].training]
            super().training_step(samples, batch_idx)

    L.seed_everything(3, verbose=False)
    watched = Watching(DELTA, TINY, SEARCH, lr=3e-3, warmup_steps=4, max_steps=10)
    trainer(project).fit(watched, data())
    assert watched.modes == [True] * 10


@needs_fairseq
def test_checkpoints_convert_both_ways(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, run, corpus = task(max_steps=10, keep_checkpoint=True), trainer(project), data()
    run.fit(found, corpus)
    run.test(found, corpus, verbose=False)
    run.save_checkpoint(project / "ours.ckpt")
    torch.save({"config": {}, **found.final()}, project / "final.ckpt")
    convert = ["fairseq-convert", f"--input={project / 'ours.ckpt'}", f"--output={project / 'theirs.pt'}"]
    assert main(convert) == 0
    # fairseq translates as Lightning does, from the file that a complete run leaves and from a converted one
    for name in ("theirs.pt", "final.ckpt"):
        capsys.readouterr()
        search = ["--beam=2", "--max-len-a=1", "--max-len-b=5", "--lenpen=0.6", "--max-tokens=4000"]
        path = f"--path={project / name}"
        assert main(["fairseq-generate", str(corpus.folder), path, "--cpu", "--scoring=sacrebleu", *search]) == 0
        shown = capsys.readouterr().out
        hypotheses = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", shown, flags=re.MULTILINE))
        assert {int(i): text for i, text in hypotheses.items()} == found._translations["test"]
        score = float(re.search(r"BLEU = ([\d.]+)", shown)[1])  # type: ignore[index]
        # fairseq prints two digits
        assert found.logged["test/bleu"] == [pytest.approx(score, abs=0.006)]
    back = ["fairseq-convert", f"--input={project / 'theirs.pt'}", f"--output={project / 'back.ckpt'}"]
    assert main(back) == 0
    other, second = task(max_steps=10), trainer(project)
    second.test(other, data(), ckpt_path=project / "back.ckpt", weights_only=True, verbose=False)
    assert other._translations == found._translations
    assert other.steps == 10


@needs_fairseq
def test_fairseq_trains_on_from_a_checkpoint_of_lightning(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, run, corpus = task(keep_checkpoint=False), trainer(project), data()
    run.fit(ours, corpus)
    # the weights of the best validation are what is converted; without one, the last ones
    ours._best = None
    run.save_checkpoint(project / "ours.ckpt")
    assert main(["fairseq-convert", f"--input={project / 'ours.ckpt'}", f"--output={project / 'theirs.pt'}"]) == 0
    fresh = [f"--reset-{part}" for part in ("optimizer", "dataloader", "meters", "lr-scheduler")]
    restored = [f"--restore-file={project / 'theirs.pt'}", *fresh, f"--save-dir={project / 'more'}", "--dropout=0"]
    further = losses_of_fairseq_train(caplog, str(corpus.folder), *restored, "--max-update=3", "--no-save")
    first, last = ours.logged["train/loss"][0], ours.logged["train/loss"][-1]
    assert len(further) == 3
    # the same first batch, with the weights that Lightning left
    assert further[0] < (first + last) / 2


@needs_fairseq
def test_what_is_no_translation_checkpoint_is_not_converted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, project / "other.ckpt")
    (project / "text.ckpt").write_text("no checkpoint")
    sentences = {
        "other.ckpt": "is no checkpoint of a",
        "text.ckpt": "it is damaged",
        "none.pt": "there is no such file",
    }
    for name, said in sentences.items():
        assert main(["fairseq-convert", f"--input={project / name}", f"--output={project / 'x'}"]) == 2
        assert said in capsys.readouterr().err


DDP_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from test_translation import data, task, trainer

found = task()
run = trainer(Path(sys.argv[2]), devices=2, strategy="ddp")
run.fit(found, data())
run.test(found, data(), verbose=False)
if run.is_global_zero:
    torch.save(found.model.state_dict(), Path(sys.argv[2]) / "two.pt")
    counts = {split: len(texts) for split, texts in found._translations.items()}
    print("FOUND " + json.dumps([found.logged["train/loss"], counts, found.logged["test/bleu"], found.tokens]))
"""


@needs_fairseq
@pytest.mark.slow
def test_two_processes_take_the_updates_of_one_with_twice_the_micro_batches(project: Path) -> None:
    one = task()
    corpus = data(accumulation=2)
    run = trainer(project)
    run.fit(one, corpus)
    run.test(one, corpus, verbose=False)
    # Lightning starts the second process with the same file
    script = project / "two.py"
    script.write_text(DDP_SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(ROOT / "tests"), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    losses, counts, test_bleu, tokens = json.loads(found.removeprefix("FOUND "))
    # float32 sums in another order, ten updates long
    assert losses == pytest.approx(one.logged["train/loss"], rel=1e-4)
    assert counts == {"valid": 12, "test": 13}
    assert test_bleu == pytest.approx(one.logged["test/bleu"], rel=1e-3)
    assert tokens == one.tokens
    two = torch.load(project / "two.pt", weights_only=True)
    # fairseq's position tables hold a buffer of one element that is never written
    written = {name: x for name, x in one.model.state_dict().items() if not name.endswith("_float_tensor")}
    for name, parameter in written.items():
        # ... and Adam divides by the size of a gradient, however small
        torch.testing.assert_close(
            two[name], parameter, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# data


def test_grammar_agrees_and_reorders() -> None:
    sources, targets = sentence_pairs("train", 300)
    assert len({*sources}) > 290
    genders = {noun.target: noun.gender for noun in NOUNS}
    endings = {word + noun.gender + n: noun.gender for word in ADJECTIVES.values() for noun in NOUNS for n in ("", "n")}
    for source, target in zip(sources, targets, strict=True):
        words = target.split()
        assert words[0] == TENSES[source.split()[0]][0]
        # each determiner has the gender of the noun behind it, each adjective that of the noun before it
        for determiner, noun in itertools.pairwise(words):
            if determiner in ("lo", "la", "lu", "no", "na", "nu"):
                stem = noun.removesuffix("n")[:-1]
                assert determiner[1] == genders[stem] == noun.removesuffix("n")[-1]
        gender = ""
        for word in words:
            if (stem := word.removesuffix("n")[:-1]) in genders:
                gender = genders[stem]
            elif word in endings:
                assert endings[word] == gender
        assert words[-2] in TENSES[source.split()[0]][1:]


def test_same_sentences_however_many_are_asked_for() -> None:
    assert sentence_pairs("valid", 5)[1] == sentence_pairs("valid", 9)[1][:5]
    assert sentence_pairs("valid", 5) != sentence_pairs("test", 5)


def write_pairs(folder: Path, n: dict[str, int], *, stems: dict[str, str] | None = None, gz: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for split, size in n.items():
        for language, lines in zip(("en", "de"), sentence_pairs(split, size), strict=True):
            text = "\n".join(lines) + "\n"
            name = f"{(stems or {}).get(split, split)}.{language}"
            if gz:
                (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
            else:
                (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_multi30k_layout_is_read_and_counted(tmp_path: Path) -> None:
    folder = write_pairs(
        tmp_path / "m", {"train": 5, "valid": 3, "test": 4}, stems={"valid": "val", "test": "test_2016_flickr"}, gz=True
    )
    assert {split: len(pairs.source) for split, pairs in read_corpus(folder, "en", "de", None).items()} == {
        "train": 5, "valid": 3, "test": 4,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"train has 5 pairs, Multi30k has 29,000; say data\.corpus: folder"):
        read_corpus(folder, "en", "de", CORPORA["multi30k"])


def test_a_folder_of_pairs_is_known_by_the_hashes_of_its_files(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "c", {"train": 5, "valid": 3, "test": 4})
    (folder / "README.md").write_text("not a sentence")
    (folder / "valid.txt").write_text("nor this")
    before = hashes_of_folder(str(folder))
    assert len(set(before)) == 6
    (folder / "test.en").write_text("another\n")
    assert len({*before} - {*hashes_of_folder(str(folder))}) == 1


def test_parquet_of_wmt14_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for stem, n in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("validation-00000-of-00001", 2),
                    ("test-00000-of-00001", 1)):  # fmt: skip
        rows = [{"de": f"Satz {stem} {i}", "en": f"sentence\n {stem} {i}"} for i in range(n)]
        parquet.write_table(pa.table({"translation": rows}), tmp_path / f"{stem}.parquet")
    found = read_corpus(tmp_path, "en", "de", None)
    assert [len(found[split].target) for split in ("train", "valid", "test")] == [5, 2, 1]
    assert found["train"].source[3] == "sentence train-00001-of-00002 0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "test.de").unlink(), "has no test.de"),
        (lambda f: (f / "train.de").write_text("nur eine\n"), "train.de has 1: line by line"),
        (lambda f: (f / "valid.en").write_text("a\n\nb\n"), "line 2 of the source sentences of valid is empty"),
        (lambda f: (f / "test.en").write_bytes(b"a\n\xff\nb\n"), "no text in UTF-8"),
        (lambda f: [(f / f"train.{x}").write_text("") for x in ("en", "de")], "is empty"),
    ],
)
def test_broken_corpora_are_refused_with_a_sentence(tmp_path: Path, change: Any, said: str) -> None:
    folder = write_pairs(tmp_path / "c", {"train": 4, "valid": 3, "test": 3})
    change(folder)
    with pytest.raises(UserError, match=said):
        read_corpus(folder, "en", "de", None)


def test_what_training_leaves_out_is_counted() -> None:
    selection = Selection(max_words=4, max_ratio=1.5)
    pairs = Pairs(["a b c", "", "a b c d e", "a b", "a b c d"], ["x y z", "x", "x y z u v", "x y z u", "x y z"])
    assert selection.keep(pairs) == Pairs(["a b c", "a b c d"], ["x y z", "x y z"])
    assert selection.sentence() == "1 with an empty line, 1 over 4 words, 1 of lengths over 1.5 : 1"


@needs_fairseq
def test_subwords_come_back_as_sentences(project: Path, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "c", {"train": 60, "valid": 5, "test": 6})
    corpus = data(corpus="folder", directory=str(folder), subwords=80)
    assert corpus.references("test") == sentence_pairs("test", 6)[1]
    assert corpus.sources("valid") == sentence_pairs("valid", 5)[0]
    assert "\u2581" in (corpus.folder / "text" / "test.de").read_text()
    with pytest.raises(UserError, match=r"data\.subwords=5 does not fit"):
        _ = data(corpus="folder", directory=str(folder), subwords=5).folder


@needs_fairseq
def test_scored_sentences_over_the_limit_are_refused_and_training_pairs_counted(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pairs(tmp_path / "c", {"train": 40, "valid": 5, "test": 6})
    with (folder / "train.en").open("a") as en, (folder / "train.de").open("a") as de:
        en.write("the " * 70 + "\n")
        de.write("lo " * 70 + "\n")
    corpus = data(corpus="folder", directory=str(folder))
    corpus.setup("fit")
    assert "of 41 training pairs 1 over 64 tokens are left out" in caplog.text
    assert sorted(i for batch in corpus._frozen_batches for i in batch) == list(range(40))
    with pytest.raises(UserError, match=r"sentences of valid have over data\.max_length=8 tokens"):
        data(corpus="folder", directory=str(folder), max_length=8).setup("fit")


@needs_fairseq
def test_every_hundredth_pair_can_be_the_validation(project: Path, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "c", {"train": 250, "valid": 5, "test": 6})
    corpus = data(corpus="folder", directory=str(folder), validation="every_100th")
    sources = sentence_pairs("train", 250)[0]
    assert corpus.sources("valid") == sources[::100]
    assert corpus.sources("train") == [s for i, s in enumerate(sources) if i % 100]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corpus": "multi30"}, "Did you mean 'multi30k'"),
        ({"validation": "none"}, "validation='none' is unknown"),
        ({"corpus": "folder"}, "needs data.directory"),
        ({"corpus": "grammar", "directory": "x"}, "reads no folder"),
        ({"max_tokens": 0}, "data.max_tokens=0 must be a whole number >= 1"),
        ({"n_pairs": 3}, "data.n_pairs=3 must be a whole number >= 20"),
    ],
)
def test_senseless_data_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": 0.0}, "model.lr=0.0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"replaced": "all"}, "unknown place"),
        ({"noncausal": "refuse"}, "no non-causal form"),
    ],
)
def test_senseless_task_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task(**options)


@needs_fairseq
def test_missing_corpus_says_where_it_would_come_from(project: Path) -> None:
    with pytest.raises(UserError, match=r"WMT14 En-De is not in .*make data-wmt14"):
        _ = data(corpus="wmt14").folder
    with pytest.raises(UserError, match=r"Multi30k is not in .*DATA=folder"):
        _ = data(corpus="multi30k").folder
    with pytest.raises(UserError, match="is no folder"):
        _ = data(corpus="multi30k", directory="nowhere").folder


# the experiment


def test_bleu_is_sacrebleus() -> None:
    pytest.importorskip("sacrebleu")
    score, signature = bleu(["the cat sat on a mat today"], ["the cat sat on the mat today"])
    # 6/7, 4/6, 2/5, 1/4 n-grams
    assert score == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    title = yaml.safe_load((ROOT / "experiments" / "table1.yaml").read_text())["title"]
    assert signature.split("|version")[0] in title


def test_compound_split_bleu_counts_the_parts_of_hyphenated_words() -> None:
    pytest.importorskip("sacrebleu")
    reference = ["ein gut-bekannter Mann geht heim."]
    found = compound_split_bleu(["ein gut-genannter Mann geht heim."], reference)
    # ein gut ##AT##-##AT## bekannter Mann geht heim . : one of 8 words is wrong, 2 of 7 pairs, 3 of 6, 4 of 5
    assert found == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25)
    # whole words: one of 6 is wrong, and no four in a row are right
    assert bleu(["ein gut-genannter Mann geht heim."], reference)[0] != pytest.approx(found, abs=1)


@needs_fairseq
def test_texts_of_a_run_are_what_the_export_reads(project: Path) -> None:
    found, run, corpus = task(max_steps=5), trainer(project), data()
    run.fit(found, corpus)
    assert found.texts() == {}
    run.test(found, corpus, verbose=False)
    rows = list(csv.DictReader(io.StringIO(found.texts()["translations.csv"])))
    assert [*rows[0]] == [*TRANSLATION_COLUMNS[1:]]
    assert [(row["source"], row["translation"]) for row in rows] == [
        (corpus.sources("test")[i], found._translations["test"][i]) for i in range(10)
    ]
    # a corpus that is not the suite's own is not repeated
    found.data.corpus = "folder"
    rows = list(csv.DictReader(io.StringIO(found.texts()["translations.csv"])))
    assert {row["source"] + row["reference"] for row in rows} == {""}
    assert rows[0]["translation"] == found._translations["test"][0]


@needs_fairseq
def test_cost_of_the_paper_profile_is_measured_without_corpus_or_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    smoke = resolve_runs(load_experiment("table1", Project(ROOT)), profile="smoke", rows=["DPFP-2"])[0]
    small = {**smoke.config["model"]["init_args"], "max_steps": 3600}
    config = {**smoke.config, "model": {**smoke.config["model"], "init_args": small}}
    config["data"] = {**config["data"], "init_args": {**config["data"]["init_args"], "corpus": "wmt14"}}
    config["trainer"] = {**config["trainer"], "accelerator": "gpu", "devices": 64, "precision": "16-mixed"}
    cost = measure(dataclasses.replace(smoke, config=config))
    assert cost is not None
    assert 0 < cost.seconds < 60
    # 3600 updates: as many hours as an update has seconds, for each device
    assert f"{64 * cost.seconds:,.1f} " in cost.sentence()
    # weights, gradients and two moments of the smoke model, at least
    assert cost.memory_mb is not None
    assert cost.memory_mb > 1
    assert main(["sweep", "table1", "--dry-run", "--measure", "--rows", "Linear"]) == 0
    shown = capsys.readouterr().out
    assert "subwords/s" in shown
    assert "200 updates on 1: 0." in shown
    assert main(["sweep", "table1", "--measure"]) == 2
    assert "belongs to --dry-run" in capsys.readouterr().err


def test_table_has_the_papers_rows_its_table_6_and_ours() -> None:
    runs = resolve_runs(load_experiment("table1", Project(ROOT)), profile="paper")
    sizes = {run.row: run.config["model"]["init_args"]["attention"] for run in runs}
    # d_dot of Tables 1 and 6: 2 m, and 2 d_key nu with d_key = 64
    for row, attention in sizes.items():
        if attention["feature_map"] == "favor":
            assert f"(m = {attention['n_features']}" in row
        if attention["feature_map"] == "dpfp":
            assert row.startswith(f"DPFP-{attention['nu']}")
    assert sorted(2 * a["n_features"] for a in sizes.values() if a["feature_map"] == "favor") == [64, 256, 384, 512]
    assert {2 * 64 * a["nu"] for a in sizes.values() if a["feature_map"] == "dpfp"} == {256, 384, 512}
    assert [row for row in sizes if "Table 6" in row] == ["Performer (m = 192, Table 6)", "DPFP-3 (Table 6)"]
    assert [row for row in sizes if "ours" in row] == ["Linear delta (ours)", "DPFP-2 delta (ours)"]
