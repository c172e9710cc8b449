"""Language modelling data: what a token, a stream, a segment and a window are, and which texts are refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from fwp_lightning.data import corpora
from fwp_lightning.data.corpora import KnownCorpus, Size
from fwp_lightning.data.facts import (
    LEXICON,
    LONGEST_DISTANCE,
    MODIFIERS,
    N_NAMES,
    N_PRESENT,
    N_THINGS,
    NAMES,
    THE,
    tell,
)
from fwp_lightning.data.vocabulary import EOS, Vocabulary
from fwp_lightning.data.wikitext import Segment, WikiTextData
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import Project

TEXTS = {
    "train": " = b = \n\n c  a b\n a b c\n\n",
    "valid": "a b\n\n",
    "test": "c\n",
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of its own, whose folder data/ takes the token files."""
    root = tmp_path / "project"
    (root / "experiments").mkdir(parents=True)
    monkeypatch.setenv("FWP_ROOT", str(root))
    return Project(root)


def put(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for split, text in {**TEXTS, **texts}.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def folder_data(folder: Path, **options: Any) -> WikiTextData:
    return WikiTextData(corpus="folder", directory=str(folder), **{"length": 2, "batch_size": 2, **options})


def numbers(n_tokens: int, tmp_path: Path, **options: Any) -> WikiTextData:
    """A text whose training tokens are 1, 2, 3, ... in order, each a word of its own on one line."""
    words = " ".join(f"w{i}" for i in range(n_tokens - 1))
    return folder_data(put(tmp_path / f"numbers{n_tokens}", train=words, valid=words, test=words), **options)


# --- vocabulary and token files ---------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The definition: split at white space, an end of line after every line, empty ones too."""
    return [word for line in text.splitlines() for word in [*line.split(), EOS]]


def test_every_line_ends_with_eos_and_words_are_ordered_by_count_then_by_first_appearance(tmp_path: Path) -> None:
    data = folder_data(put(tmp_path / "text"))
    # b 3; then "=", c and a with 2 each, in the order in which they come
    assert data.vocabulary.words == [EOS, "b", "=", "c", "a"]
    for split, text in TEXTS.items():
        assert data.vocabulary.decode(data.tokens(split)) == words_of(text)  # type: ignore[arg-type]
    assert data.vocabulary_size == 5


def test_a_word_eos_in_the_text_is_the_end_of_line(tmp_path: Path) -> None:
    data = folder_data(put(tmp_path / "text", train="b <eos> a c\n"))
    assert data.vocabulary.words == [EOS, "b", "a", "c"]
    assert data.tokens("train").tolist() == [1, 0, 2, 3, 0]


def test_counting_a_long_text_in_chunks_equals_counting_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    lines = [" ".join(f"w{n}" for n in rng.zipf(1.5, size=rng.integers(0, 9)) if n < 500) for _ in range(2000)]
    text = "\n".join(lines)
    monkeypatch.setattr("fwp_lightning.data.vocabulary.CHUNK_TOKENS", 7)
    monkeypatch.setattr("fwp_lightning.data.token_files.CHUNK_TOKENS", 11)
    data = folder_data(put(tmp_path / "text", train=text, valid="w1\n", test="w1\n"))
    words = words_of(text)
    expected = [EOS, *(word for word, _ in Counter(word for word in words if word != EOS).most_common())]
    assert data.vocabulary.words == expected
    assert data.vocabulary.decode(data.tokens("train")) == words


def test_token_files_are_mapped_and_made_once(tmp_path: Path, project: Project) -> None:
    folder = put(tmp_path / "text")
    data = folder_data(folder)
    assert isinstance(data.tokens("train"), np.memmap)
    assert data.tokens("train").dtype == np.uint16
    (made,) = [path for path in (project.data / "tokens").iterdir() if path.is_dir()]
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = folder_data(folder)
    assert again.data_sha256() == data.data_sha256()
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_more_than_65536_words_take_four_bytes(tmp_path: Path) -> None:
    data = numbers(2**16 + 2, tmp_path)
    assert data.vocabulary_size == 2**16 + 2
    assert data.tokens("train").dtype == np.int32
    assert data.tokens("train")[-2] == 2**16 + 1


def test_a_changed_text_is_read_anew(tmp_path: Path) -> None:
    folder = put(tmp_path / "text")
    before = folder_data(folder)
    before.prepare_data()
    put(folder, train="a b c d\n")
    after = folder_data(folder)
    assert after.vocabulary.words == [EOS, "a", "b", "c", "d"]
    assert after.data_sha256() != before.data_sha256()
    # an open text stays what it was
    assert before.vocabulary.decode(before.tokens("train")) == words_of(TEXTS["train"])


def test_the_same_text_has_one_hash_in_every_container(tmp_path: Path) -> None:
    plain = folder_data(put(tmp_path / "plain")).data_sha256()
    gzipped, parquet, archive = (tmp_path / name for name in ("gzipped", "parquet", "archive"))
    for split, text in TEXTS.items():
        for folder in (gzipped, parquet, archive):
            folder.mkdir(exist_ok=True)
        with gzip.open(gzipped / f"{split}.txt.gz", "wt", encoding="utf-8") as sink:
            sink.write(text)
        # as the hub has it: a row a line, blank lines are "", and a text may be cut into several files
        rows = [f"{line}\n" if line.strip() else "" for line in text.splitlines()]
        for number, part in enumerate((rows[:2], rows[2:])):
            shard = parquet / (f"{split}-{number}.parquet" if split == "train" else f"{split}.parquet")
            if split == "train" or number == 0:
                content = part if split == "train" else rows
                pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(content, pyarrow.string())}), shard)
        (archive / f"wiki.{split}.tokens").write_text(text, encoding="utf-8")
    assert {folder_data(folder).data_sha256() for folder in (gzipped, parquet, archive)} == {plain}


def test_processes_that_make_the_same_files_at_once_agree(tmp_path: Path, project: Project) -> None:
    words = " ".join(f"w{i % 5000}" for i in range(200_000))
    folder = put(tmp_path / "text", train=words, valid="w1 w2\n", test="w3\n")
    script = (
        "import sys; from pathlib import Path; from fwp_lightning.data.corpora import files_of_corpus\n"
        "from fwp_lightning.data.token_files import open_token_files\n"
        "text = open_token_files(files_of_corpus(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "print(text.sha256, len(text.tokens['train']))"
    )
    command = [sys.executable, "-c", script, str(folder), str(project.data / "tokens")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0] for process in started}
    assert len(answers) == 1
    assert answers.pop().split()[1] == "200001"
    visible = [path.name for path in (project.data / "tokens").iterdir() if not path.name.startswith(".")]
    assert len(visible) == 1


def test_what_a_killed_process_left_behind_is_no_obstacle(tmp_path: Path, project: Project) -> None:
    folder = put(tmp_path / "text")
    expected = folder_data(folder).data_sha256()
    tokens = project.data / "tokens"
    (made,) = [path for path in tokens.iterdir() if path.is_dir()]
    made.rename(tokens / f".{made.name}.part")
    assert folder_data(folder).data_sha256() == expected
    assert not (tokens / f".{made.name}.part").exists()


# --- streams and segments ---------------------------------------------------------------------------------------------


def test_segments_are_cut_from_contiguous_streams_as_in_the_released_batching(tmp_path: Path) -> None:
    # 23 tokens in 2 streams of 11: 10 targets each, so segments of 4, 4 and 2
    data = numbers(23, tmp_path, length=4, batch_size=2)
    stream = torch.from_numpy(np.array(data.tokens("train"))).long()
    assert data.steps_per_epoch == 3
    for step in range(7):
        (segment,) = data.training_segments(step)
        start = 4 * (step % 3)
        stop = min(start + 4, 10)
        for row, offset in enumerate((0, 11)):
            assert segment.inputs[row].tolist() == stream[offset + start : offset + stop].tolist()
            assert segment.targets[row].tolist() == stream[offset + start + 1 : offset + stop + 1].tolist()
        assert segment.continues == (step % 3 > 0)
        assert segment.inputs.dtype == torch.int64


def test_batches_per_epoch_of_the_paper() -> None:
    # 103,227,021 tokens; 96 x 256 and 56 x 384
    for batch_size, length, expected in [(96, 256, 4201), (56, 384, 4801)]:
        n = 103_227_021 // batch_size
        assert math.ceil((n - 1) / length) == expected


def test_every_target_of_an_epoch_comes_once(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=7, batch_size=3)
    targets = [t for step in range(data.steps_per_epoch) for s in data.training_segments(step) for t in s.targets]
    found = sorted(int(token) for row in targets for token in row)
    stream = data.tokens("train")
    lost = {0, 33, 66, 99, 100}
    assert found == sorted(int(token) for position, token in enumerate(stream) if position not in lost)


def test_micro_batches_and_ranks_share_the_streams(tmp_path: Path) -> None:
    whole = numbers(101, tmp_path, length=5, batch_size=4).training_segments(2)[0]
    parts = numbers(101, tmp_path, length=5, batch_size=4, accumulation=2).training_segments(2)
    assert [part.part for part in parts] == [0, 1]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    shares = []
    for rank in range(2):
        data = numbers(101, tmp_path, length=5, batch_size=4, accumulation=2)
        data.trainer = FakeTrainer(rank=rank, world_size=2)  # type: ignore[assignment]
        shares += data.training_segments(2)
    assert torch.equal(torch.cat([share.inputs for share in shares]), whole.inputs)


class FakeTrainer:
    """What the data module reads of a trainer."""

    def __init__(self, *, epoch: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.current_epoch, self.global_rank, self.world_size = epoch, rank, world_size


def test_a_lightning_epoch_is_a_block_of_steps_wherever_it_is_resumed(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=5, batch_size=4, accumulation=2, steps_per_block=3)
    for epoch in (0, 4):
        data.trainer = FakeTrainer(epoch=epoch)  # type: ignore[assignment]
        loader = data.train_dataloader()
        found: list[Segment] = list(loader)
        assert len(loader) == len(found) == 6
        expected = [segment for step in range(3 * epoch, 3 * epoch + 3) for segment in data.training_segments(step)]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets, theirs.targets)
            assert ours[2:] == theirs[2:]


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_tokens", "length"), [(12, 11), (12, 5), (101, 10), (257, 16)])
def test_segments_of_one_stream_score_every_token_but_the_first_in_order(
    n_tokens: int, length: int, tmp_path: Path
) -> None:
    data = numbers(n_tokens, tmp_path)
    segments = list(data.segments("test", length=length))
    assert len(segments) == len(data.segments("test", length=length)) == math.ceil((n_tokens - 1) / length)
    scored = torch.cat([segment.targets[0] for segment in segments])
    assert scored.tolist() == data.tokens("test")[1:].tolist()
    assert [segment.continues for segment in segments] == [False] + [True] * (len(segments) - 1)


@pytest.mark.parametrize(("n_tokens", "length"), [(12, 11), (12, 5), (101, 10)])
@pytest.mark.parametrize("stride", [1, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_windows_score_every_token_once_with_the_text_before_it(
    n_tokens: int, length: int, stride: int, batch_size: int, tmp_path: Path
) -> None:
    data = numbers(n_tokens, tmp_path)
    tokens = data.tokens("test").tolist()
    place = {token: position for position, token in enumerate(tokens)}
    windows = data.windows("test", batch_size=batch_size, length=length, stride=stride)
    assert len(list(windows)) == len(windows)
    scored: list[int] = []
    for batch in windows:
        assert len(batch.inputs) <= batch_size
        for inputs, targets, counts in zip(*batch, strict=True):
            assert inputs.tolist()[1:] == targets.tolist()[:-1]
            start = place[int(inputs[0])]
            assert [*inputs.tolist(), int(targets[-1])] == tokens[start : start + length + 1]
            if scored:
                first = int(counts.int().argmax())
                assert first >= length - stride
                assert bool(counts[first:].all())
            else:
                assert bool(counts.all())
            scored += targets[counts].tolist()
    assert scored == tokens[1:]


def test_windows_of_stride_one_are_those_of_the_released_evaluation(tmp_path: Path) -> None:
    n_tokens, length = 60, 8
    data = numbers(n_tokens, tmp_path)
    (batch,) = data.windows("test", batch_size=1000, length=length)
    tokens = data.tokens("test").tolist()
    # feed i .. i+T-1 for i = 0 .. N-T-1; score all of the first, then only the last position
    assert batch.inputs.tolist() == [tokens[i : i + length] for i in range(n_tokens - length)]
    assert batch.scored.sum(1).tolist() == [length] + [1] * (n_tokens - length - 1)
    assert int(batch.scored.sum()) == n_tokens - 1


@pytest.mark.parametrize(
    ("n_tokens", "scored", "windows", "segments"),
    [(217_646, 217_645, {256: 217_390, 384: 217_262}, {256: 851, 384: 567}),
     (245_569, 245_568, {256: 245_313, 384: 245_185}, {256: 960, 384: 640})],
    ids=["valid", "test"],
)  # fmt: skip
def test_a_text_as_long_as_wikitext_103s_is_scored_to_the_token(
    n_tokens: int, scored: int, windows: dict[int, int], segments: dict[int, int]
) -> None:
    data = WikiTextData("facts")
    data._text.tokens["valid"] = np.zeros(n_tokens, dtype=np.uint16)
    for length in (256, 384):
        shapes = (
            (len(batch.inputs), int(batch.scored.sum()))
            for batch in data.windows("valid", batch_size=512, length=length)
        )
        assert [sum(numbers) for numbers in zip(*shapes, strict=True)] == [windows[length], scored]
        passed = data.segments("valid", length=length)
        assert len(passed) == segments[length]
        assert sum(segment.targets.numel() for segment in passed) == scored


def test_ten_streams_lose_the_first_token_of_each_and_the_remainder(tmp_path: Path) -> None:
    data = numbers(217, tmp_path)
    assert sum(s.targets.numel() for s in data.segments("valid", batch_size=10, length=8)) == 217 - 10 - 7


def test_ranks_share_windows_and_streams(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=6)
    whole = [t for b in data.windows("test", batch_size=7) for t in b.targets[b.scored].tolist()]
    shared = [
        t
        for rank in range(3)
        for b in data.windows("test", batch_size=7, rank=rank, world_size=3)
        for t in b.targets[b.scored].tolist()
    ]
    assert shared == whole
    by_rank = [list(data.segments("test", batch_size=4, rank=rank, world_size=2)) for rank in range(2)]
    for first, second, both in zip(*by_rank, data.segments("test", batch_size=4), strict=True):
        assert torch.equal(torch.cat([first.inputs, second.inputs]), both.inputs)
    # three ranks cannot share one stream
    assert len(list(data.segments("test", rank=2, world_size=3))) == len(data.segments("test"))


def test_validation_during_training_goes_through_the_text_in_segments(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=6, evaluation_batch_size=4)
    for ours, theirs in zip(data.val_dataloader(), data.segments("valid", batch_size=4), strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert ours.continues == theirs.continues


def test_the_final_evaluation_is_what_the_task_chooses(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=6)
    assert data.test_dataloader() == []
    data.test_batches = [data.windows("valid", batch_size=9), data.segments("test", length=5)]
    windows, segments = data.test_dataloader()
    assert sum(int(batch.scored.sum()) for batch in windows) == 100
    assert sum(batch.targets.numel() for batch in segments) == 100


# --- texts that are refused -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> KnownCorpus:
    """`TEXTS` in place of WikiText-2."""
    sizes = {"train": Size(5, 14), "valid": Size(2, 4), "test": Size(1, 2)}
    known = KnownCorpus(name="wikitext-2", title="Tiny", vocabulary_size=5, sizes=sizes)
    monkeypatch.setitem(corpora.KNOWN_CORPORA, "wikitext-2", known)
    return known


def test_a_known_corpus_is_found_where_downloads_lie(project: Project, tiny: KnownCorpus) -> None:
    project.data.mkdir()
    put(project.data / "wikitext-2")
    data = WikiTextData("wikitext-2")
    assert data.vocabulary_size == len(data.vocabulary) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": TEXTS["train"] + "b\n"}, "train has 16 tokens in 6 lines, Tiny has 14 in 5"),
        ({"test": "c c\n"}, "test has 3 tokens in 1 lines, Tiny has 2 in 1"),
        ({"train": " = b = \n\n c  a d\n a b c\n\n"}, "train has 6 different words"),
    ],
)
def test_counts_that_are_not_the_corpus_own_are_refused(
    change: dict[str, str], said: str, tiny: KnownCorpus, tmp_path: Path
) -> None:
    data = WikiTextData("wikitext-2", directory=str(put(tmp_path / "text", **change)))
    with pytest.raises(UserError, match=said) as caught:
        data.prepare_data()
    assert "make data-wikitext2" in str(caught.value)


def test_a_corpus_that_was_not_fetched_is_named_with_the_target_that_fetches_it() -> None:
    with pytest.raises(UserError, match=r"WikiText-103 is not in .*make data-wikitext103"):
        _ = WikiTextData("wikitext-103").vocabulary_size


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "text")
    (folder / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"has no valid\.txt"):
        folder_data(folder).prepare_data()
    with pytest.raises(UserError, match="nowhere is no folder"):
        folder_data(tmp_path / "nowhere").prepare_data()


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "text")
    (folder / "wiki.train.tokens").touch()
    with pytest.raises(UserError, match=r"train\.txt and wiki\.train\.tokens"):
        folder_data(folder).prepare_data()


def test_the_first_unknown_word_is_named_with_its_line(tmp_path: Path) -> None:
    folder = put(tmp_path / "text", test="a b\nc zebra yak\n")
    with pytest.raises(UserError, match=r"test\.txt, line 2: the word 'zebra' is not in the training text"):
        folder_data(folder).prepare_data()
    with pytest.raises(UserError, match="no 'zebra'"):
        Vocabulary([EOS, "a"]).encode(["a", "zebra"])


def damaged_gzip(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.txt.gz", damaged_gzip("a b c " * 1000), "truncated or damaged"),
        ("train.txt.gz", b"a b c\n", "is not gzipped"),
        ("train.parquet", b"PAR1 and no more", "no parquet file with a column of texts"),
        ("train.txt", b"a \xff b\n", "no text in UTF-8"),
        ("train.txt", b"", "holds no word"),
        ("train.txt", b"\n \n\n", "holds no word"),
        ("train.txt", b"a b c\n" + b"\n" * 200, "200 of 201 lines are empty"),
    ],
)
def test_files_that_are_no_text_are_refused(
    name: str, content: bytes, said: str, tmp_path: Path, project: Project
) -> None:
    folder = put(tmp_path / "text")
    (folder / "train.txt").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        folder_data(folder).prepare_data()
    # nothing half-made stays behind
    assert not [path for path in (project.data / "tokens").iterdir() if path.is_dir()]


def test_a_parquet_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "text")
    (folder / "train.txt").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"line": ["a b c"]}), folder / "train.parquet")
    with pytest.raises(UserError, match="no parquet file with a column of texts"):
        folder_data(folder).prepare_data()


def test_text_that_no_segment_fits_into_is_refused(tmp_path: Path) -> None:
    data = numbers(33, tmp_path, length=8, batch_size=4)
    with pytest.raises(UserError, match=r"33 tokens make 4 streams of 8, .* length \+ 1 = 9"):
        data.setup("fit")
    with pytest.raises(UserError, match="33 tokens make one stream"):
        data.windows("test", batch_size=8, length=33)
    with pytest.raises(UserError, match="33 tokens make one stream"):
        data.segments("test", length=33)
    assert sum(int(b.scored.sum()) for b in data.windows("test", batch_size=8, length=32)) == 32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corpus": "wikitext-3"}, "Did you mean 'wikitext-103'"),
        ({"length": 0}, r"data\.length=0"),
        ({"batch_size": 1.5}, r"data\.batch_size=1\.5"),
        ({"batch_size": 10, "accumulation": 3}, r"data\.batch_size=10 does not divide by data\.accumulation=3"),
        ({"corpus": "facts", "directory": "somewhere"}, "generated and reads no folder"),
        ({"corpus": "folder"}, r"needs data\.directory"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WikiTextData(**options)


def test_streams_that_do_not_divide_among_devices_are_refused(tmp_path: Path) -> None:
    data = numbers(101, tmp_path, length=4, batch_size=4)
    data.trainer = FakeTrainer(world_size=3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"batch_size=4 does not divide by .* on 3 devices"):
        data.setup("fit")


def test_a_stride_longer_than_a_window_would_skip_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stride=9"):
        numbers(101, tmp_path).windows("test", batch_size=1, length=8, stride=9)


# --- the generated text -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story() -> list[list[str]]:
    return list(tell("train", 200_000))


def test_the_generated_text_is_the_same_everywhere() -> None:
    # results that were tracked on this text would belong to another one if this hash changed
    assert WikiTextData("facts").data_sha256() == "3908965bf63cbd7117d03f06a7f18e5c69fa19f5f59d0429eea11e80ebc6ce46"


def test_the_generated_text_has_the_length_asked_for(story: list[list[str]]) -> None:
    total = sum(len(line) + 1 for line in story)
    assert 200_000 <= total < 200_000 + LONGEST_DISTANCE + 4


def test_the_generated_vocabulary_is_complete_in_a_text_of_any_length() -> None:
    for n_tokens in (10, 50_000):
        data = WikiTextData("facts", n_tokens=n_tokens)
        assert data.vocabulary_size == len(data.vocabulary) == len(set(LEXICON)) + 1


def test_splits_of_the_generated_text_differ(story: list[list[str]]) -> None:
    valid, test = (list(tell(split, 2000)) for split in ("valid", "test"))
    assert valid[:50] != test[:50]
    assert story[len(LEXICON) : len(LEXICON) + 50] != valid[:50]


def told(story: list[list[str]]) -> list[list[str]]:
    return story[len(LEXICON) :]


def facts_of(story: list[list[str]]) -> Iterator[tuple[str, str, str, int]]:
    """Yield what is done, the name (four letters), the thing, and where, for each line that is about one."""
    position = 0
    for line in told(story):
        if line[0] in NAMES:
            assert line[1][:4] == line[0]
        if line[0] != THE:
            yield "ask" if line[0] in NAMES else "write", line[-1][:4], line[-1][4:], position
        position += len(line) + 1


def test_answers_are_what_was_written_last(story: list[list[str]]) -> None:
    has: dict[str, str] = {}
    asked = 0
    for what, name, thing, _ in facts_of(story):
        if what == "write":
            has[name] = thing
        else:
            assert has[name] == thing
            asked += 1
    assert asked > 10_000


def test_facts_are_overwritten_and_asked_for_after_it(story: list[list[str]]) -> None:
    has: dict[str, str] = {}
    written: Counter[str] = Counter()
    overwritten = changed = asked = 0
    for what, name, thing, _ in facts_of(story):
        if what == "write":
            overwritten += name in has
            changed += name in has and has[name] != thing
            has[name] = thing
            written[name] += 1
        else:
            asked += 1
    # whoever left comes back with empty hands, and may then get what it had
    assert changed > 0.95 * overwritten
    assert min(written.values()) > 1000
    assert len(written) == N_NAMES


def test_answers_are_near_but_not_all_in_one_segment_and_cannot_be_guessed(story: list[list[str]]) -> None:
    distances, answers = [], Counter[str]()
    written: dict[str, int] = {}
    for what, name, thing, position in facts_of(story):
        if what == "write":
            written[name] = position
        else:
            distances.append(position - written[name])
            answers[thing] += 1
    within = np.mean(np.array(distances) < 64)
    assert 0.6 < within < 0.9
    shares = np.array(list(answers.values())) / sum(answers.values())
    # as many as there are things, as good as equally often
    assert math.exp(-float((shares * np.log(shares)).sum())) == pytest.approx(N_THINGS, rel=0.01)


def test_few_names_are_present_at_a_time(story: list[list[str]]) -> None:
    names = [name for _, name, _, _ in facts_of(story)]
    present = [len(set(names[start : start + 12])) for start in range(0, len(names) - 12, 12)]
    assert np.mean(present) < N_PRESENT + 0.5


def test_verbs_agree_with_their_nouns_over_a_distance(story: list[list[str]]) -> None:
    distances = Counter[int]()
    for line in told(story):
        if line[0] == THE:
            assert line[1].endswith("s") == line[-1].endswith("s")
            distances[len(line) - 3] += 1
    assert set(distances) == set(range(1, LONGEST_DISTANCE + 1))


def test_words_are_zipfian(story: list[list[str]]) -> None:
    modifiers = set(MODIFIERS)
    counts = Counter(word for line in told(story) for word in line if word in modifiers)
    frequencies = np.array([count for _, count in counts.most_common(200)])
    slope = np.polyfit(np.log(np.arange(1, 201)), np.log(frequencies), 1)[0]
    # about 50,000 words drawn: the rarest of them are counted to 10 %
    assert slope == pytest.approx(-1.0, abs=0.05)


def test_text_json_says_what_was_read(tmp_path: Path, project: Project) -> None:
    data = folder_data(put(tmp_path / "text"))
    data.prepare_data()
    (found,) = (project.data / "tokens").glob("*/text.json")
    facts = json.loads(found.read_text(encoding="utf-8"))
    words = "= b =\n\nc a b\na b c\n\n"
    expected = {"lines": 5, "tokens": 14, "sha256": hashlib.sha256(words.encode()).hexdigest()}
    assert facts["sizes"]["train"] == expected
    assert facts["sha256"] == data.data_sha256()
