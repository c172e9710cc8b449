"""Word-level corpora: where they come from, what they must contain, and how their files are read line by line."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fwp_lightning.data.download import Progress, RemoteFile, download, sha256_of_file
from fwp_lightning.data.parallel_text import files_of_pairs
from fwp_lightning.errors import UserError

SPLITS = ("train", "valid", "test")
# the revision of the repository on the model hub whose file sizes stand below
HUB = "https://huggingface.co/datasets/Salesforce/wikitext/resolve/b08601e04326c79dfdd32d625aee71d232d685c3"
# of WikiText-103's training lines 35 % are blank, as they stand between headings and paragraphs
MOST_BLANK = 0.9
LINES_BEFORE_BLANK_COUNTS = 100


@dataclass(frozen=True)
class Size:
    """What a split contains."""

    lines: int
    tokens: int
    """Words and one end of line each"""
    sha256: str = ""
    """Of its words, a space between them, a newline after each line; empty: not known"""


@dataclass(frozen=True)
class KnownCorpus:
    """A corpus that results are compared on: its counts are part of its name."""

    name: str
    title: str
    vocabulary_size: int
    sizes: dict[str, Size]
    files: tuple[RemoteFile, ...] = field(default=())

    @property
    def make_target(self) -> str:
        """The target that fetches it."""
        return f"data-{self.name.replace('-', '')}"


def _wikitext(
    number: int, *, vocabulary_size: int, train: Size, valid_sha256: str, test_sha256: str, files: dict[str, int]
) -> KnownCorpus:
    """Return a WikiText; ``files`` has the name of each file on the hub, and its bytes."""
    name = f"wikitext-{number}"
    return KnownCorpus(
        name=name,
        title=f"WikiText-{number}",
        vocabulary_size=vocabulary_size,
        # the evaluation texts of both have the same counts and differ in their <unk>
        sizes={
            "train": train,
            "valid": Size(3_760, 217_646, valid_sha256),
            "test": Size(4_358, 245_569, test_sha256),
        },
        files=tuple(
            RemoteFile(f"{HUB}/{name}-v1/{file}.parquet", f"{file}.parquet", size) for file, size in files.items()
        ),
    )


_TWO = _wikitext(
    2,
    vocabulary_size=33_278,
    train=Size(36_718, 2_088_628),
    valid_sha256="4427e8fc24d5ceaaff4f1d9ee42f4e82172572b107d6a4e1f32d84fa7913c3ff",
    test_sha256="f68796e87c3250872a5a82da5027c4f75494ca617fbad67e36acce8a057ff3e8",
    files={
        "train-00000-of-00001": 6_068_114,
        "validation-00000-of-00001": 617_738,
        "test-00000-of-00001": 685_430,
    },
)
_ONE_HUNDRED_AND_THREE = _wikitext(
    103,
    vocabulary_size=267_735,
    train=Size(1_801_350, 103_227_021),
    valid_sha256="457c37cc16b260d7052de1cc82854038ea655c4b281277a6d57dfd353d208bbb",
    test_sha256="d60a1c910b4ed1cd5fcba38f3aa51a8dada0b15b8787a2bf85d78eff346696c7",
    files={
        "train-00000-of-00002": 155_788_327,
        "train-00001-of-00002": 155_928_670,
        "validation-00000-of-00001": 655_106,
        "test-00000-of-00001": 721_735,
    },
)
KNOWN_CORPORA = {corpus.name: corpus for corpus in (_TWO, _ONE_HUNDRED_AND_THREE)}


class Downloadable(Protocol):
    """A corpus that consists of files on a server."""

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """What is fetched."""
        ...


def fetch_corpus(corpus: Downloadable, folder: Path, progress: Progress = lambda done, total: None) -> list[Path]:
    """Fetch the files of a corpus that are not in ``folder`` yet; return all of them."""
    whole = sum(file.size or 0 for file in corpus.files)
    found: list[Path] = []
    for number, file in enumerate(corpus.files):
        before = sum(earlier.size or 0 for earlier in corpus.files[:number])

        def add(done: int, _: int | None, before: int = before) -> None:
            progress(before + done, whole or None)

        found.append(download(file, folder, add))
        add(file.size or 0, None)
    return found


# --- files of a split ------------------------------------------------------------------------------------------------


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of one split in order: text, gzipped text, parquet, or the names of WikiText's own archive."""
    names = (f"{split}.txt", f"{split}.txt.gz", f"{split}.parquet", f"wiki.{split}.tokens")
    found = [[folder / name] for name in names if (folder / name).is_file()]
    # the hub says "validation"
    if shards := sorted(folder.glob(f"{split}*-[0-9]*.parquet")):
        found.append(shards)
    if len(found) > 1:
        both = " and ".join(files[0].name for files in found)
        raise UserError(f"{folder} has {both}: which of them is the text is not clear; move all but one away.")
    return found[0] if found else []


def files_of_corpus(folder: Path) -> dict[str, list[Path]]:
    """Return the files of all splits; a missing one is an error."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name one with train.txt, valid.txt and test.txt, plain or gzipped.")
    files = {split: files_of_split(folder, split) for split in SPLITS}
    if missing := [split for split, found in files.items() if not found]:
        names = " and ".join(f"{split}.txt" for split in missing)
        raise UserError(f"{folder} has no {names} (nor {missing[0]}.txt.gz, {missing[0]}.parquet); put the text there.")
    return files


def hashes_of_folder(folder: str) -> tuple[str, ...]:
    """Return the SHA-256 of each file of a folder's text, or of its parallel texts (train.en, train.de, ...)."""
    if pairs := files_of_pairs(Path(folder).expanduser()):
        return tuple(map(sha256_of_file, pairs))
    files = files_of_corpus(Path(folder).expanduser())
    return tuple(sha256_of_file(path) for paths in files.values() for path in paths)


def read_lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of each line: what stands between white space, case kept (empty lines are empty lists)."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet_lines(path)
            return
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as text:
            for line in text:
                yield line.split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start} of a block); save it as UTF-8.") from error
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); fetch or copy it again.") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path} is not gzipped ({error}); fetch it again or rename it to {path.stem}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _parquet_lines(path: Path) -> Iterator[list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as content:
            for batch in content.iter_batches(columns=["text"]):
                for line in batch.column(0).to_pylist():
                    yield line.split()
    except (pyarrow.ArrowException, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no parquet file with a column of texts ({error}); fetch it again.") from error


class LineCheck:
    """Passes lines through, counts them, and refuses what cannot be a text."""

    def __init__(self, source: str) -> None:
        """Name the text as complaints shall."""
        self.source = source
        self.lines = 0
        self.tokens = 0
        self._blank = 0
        self._hash = hashlib.sha256()

    def over(self, lines: Iterator[list[str]]) -> Iterator[list[str]]:
        """Yield the lines; at their end complain if they hold no text, or next to none."""
        for words in lines:
            self.lines += 1
            self.tokens += len(words) + 1
            self._blank += not words
            self._hash.update(f"{' '.join(words)}\n".encode())
            yield words
        if self._blank == self.lines:
            raise UserError(f"{self.source} holds no word; put the text there.")
        if self.lines > LINES_BEFORE_BLANK_COUNTS and self._blank > MOST_BLANK * self.lines:
            raise UserError(
                f"{self.source}: {self._blank:,} of {self.lines:,} lines are empty, and each would count as a token; "
                f"remove them, or look whether the file was converted wrongly."
            )

    @property
    def size(self) -> Size:
        """What was read."""
        return Size(self.lines, self.tokens, self._hash.hexdigest())


def check_counts(corpus: KnownCorpus, sizes: dict[str, Size], vocabulary_size: int, folder: Path) -> None:
    """Raise ``UserError`` if a text is not the corpus that it is called."""
    for split, expected in corpus.sizes.items():
        found = sizes[split]
        if (found.lines, found.tokens) != (expected.lines, expected.tokens):
            raise UserError(
                f"{folder}: {split} has {found.tokens:,} tokens in {found.lines:,} lines, {corpus.title} has "
                f"{expected.tokens:,} in {expected.lines:,}; fetch it with make {corpus.make_target}, or say "
                f"data.corpus: folder if it is a text of your own."
            )
        if expected.sha256 not in ("", found.sha256):
            raise UserError(
                f"{folder}: {split} has the counts of {corpus.title} but other words (SHA-256 {found.sha256[:12]}... "
                f"instead of {expected.sha256[:12]}...; the WikiTexts differ in what is <unk>); fetch it with make "
                f"{corpus.make_target}."
            )
    if vocabulary_size != corpus.vocabulary_size:
        raise UserError(
            f"{folder}: train has {vocabulary_size:,} different words with {'<eos>'}, {corpus.title} has "
            f"{corpus.vocabulary_size:,}; fetch it with make {corpus.make_target}."
        )
