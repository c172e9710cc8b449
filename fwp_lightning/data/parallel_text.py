"""Parallel corpora: where their splits lie, what they hold, and which pairs a training leaves out."""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fwp_lightning.data.download import RemoteFile
from fwp_lightning.errors import UserError

SPLITS = ("train", "valid", "test")
# the names that a split's files have in the known corpora
STEMS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test", "test_2016_flickr")}
HUB = "https://huggingface.co/datasets/wmt/wmt14/resolve/main/de-en"


class Pairs(NamedTuple):
    """The sentences of one split and their translations, line by line."""

    source: list[str]
    target: list[str]


@dataclass(frozen=True)
class ParallelCorpus:
    """A corpus that can be checked by its number of pairs."""

    name: str
    title: str
    n_pairs: dict[str, int]
    unescape: bool = False
    """Whether its text has Moses escapes such as &quot; here and there"""
    files: tuple[RemoteFile, ...] = ()


CORPORA = {
    corpus.name: corpus
    for corpus in (
        ParallelCorpus("multi30k", "Multi30k", {"train": 29_000, "valid": 1_014, "test": 1_000}),
        ParallelCorpus(
            "wmt14_mini", "the small WMT14 extract", {"train": 10_000, "valid": 3_000, "test": 2_737}, unescape=True
        ),
        # newstest2013 and the full newstest2014; the hub states the hash of each file
        ParallelCorpus(
            "wmt14",
            "WMT14 En-De",
            {"train": 4_508_785, "valid": 3_000, "test": 3_003},
            files=tuple(
                RemoteFile(f"{HUB}/{name}.parquet", f"{name}.parquet")
                for name in (
                    *(f"train-0000{i}-of-00003" for i in range(3)),
                    "validation-00000-of-00001",
                    "test-00000-of-00001",
                )
            ),
        ),
    )
}


@dataclass
class Selection:
    """Which training pairs are kept, and how many were left out for which reason."""

    max_words: int = 0
    """Longest sentence of a pair, in words; 0: any."""
    max_ratio: float = 0.0
    """Longer sentence over shorter one; 0: any."""
    left_out: dict[str, int] = field(default_factory=dict)

    def keep(self, pairs: Pairs) -> Pairs:
        """Return the pairs without empty, long and ill-matched ones."""
        kept = [pair for pair in zip(*pairs, strict=True) if not self._reason_against(*pair)]
        return Pairs([source for source, _ in kept], [target for _, target in kept])

    def _reason_against(self, source: str, target: str) -> str | None:
        lengths = len(source.split()), len(target.split())
        reason = None
        if min(lengths) == 0:
            reason = "with an empty line"
        elif self.max_words and max(lengths) > self.max_words:
            reason = f"over {self.max_words} words"
        elif self.max_ratio and max(lengths) > self.max_ratio * min(lengths):
            reason = f"of lengths over {self.max_ratio:g} : 1"
        if reason:
            self.left_out[reason] = self.left_out.get(reason, 0) + 1
        return reason

    def sentence(self) -> str:
        """Return what was left out, in words; empty if nothing was."""
        return ", ".join(f"{number:,} {reason}" for reason, number in self.left_out.items())


def read_corpus(folder: Path, source: str, target: str, known: ParallelCorpus | None) -> dict[str, Pairs]:
    """Return the splits of the corpus in ``folder``, plain, gzipped or parquet; ``UserError`` if they do not fit."""
    splits = {}
    for split in SPLITS:
        pairs = _read_split(folder, split, source, target)
        if known is not None:
            expected = known.n_pairs[split]
            if len(pairs.source) != expected:
                raise UserError(
                    f"{folder}: {split} has {len(pairs.source):,} pairs, {known.title} has {expected:,}; say "
                    "data.corpus: folder if it is a corpus of your own."
                )
            if known.unescape:
                pairs = Pairs(*([html.unescape(line) for line in lines] for lines in pairs))
        _check_split(folder, split, pairs)
        splits[split] = pairs
    return splits


def files_of_pairs(folder: Path) -> list[Path]:
    """Return the files of a folder that are sentences of a split in one language: train.en, val.de.gz and so on."""
    stems = "|".join(stem for names in STEMS.values() for stem in names)
    found = (path for path in folder.glob("*") if re.fullmatch(rf"({stems})\.[a-z]{{2,3}}(\.gz)?", path.name))
    return sorted(path for path in found if ".txt" not in path.suffixes)


def _check_split(folder: Path, split: str, pairs: Pairs) -> None:
    """Refuse what would silently change a score: an empty line in a split that is scored."""
    for language, lines in pairs._asdict().items():
        if split != "train" and (empty := [i for i, line in enumerate(lines, start=1) if not line.strip()]):
            raise UserError(
                f"{folder}: line {empty[0]} of the {language} sentences of {split} is empty ({len(empty)} in all); "
                "every sentence of a scored split has to have a translation, remove or fill the pair."
            )


def _read_split(folder: Path, split: str, source: str, target: str) -> Pairs:
    if shards := [path for stem in STEMS[split] for path in sorted(folder.glob(f"{stem}-[0-9]*.parquet"))]:
        return _read_parquet(shards, source, target)
    found = [_find(folder, split, language) for language in (source, target)]
    pairs = Pairs(*(list(_read_lines(path)) for path in found))
    if len(pairs.source) != len(pairs.target):
        raise UserError(
            f"{found[0]} has {len(pairs.source):,} lines and {found[1]} has {len(pairs.target):,}: line by line they "
            "must be translations of each other."
        )
    if not pairs.source:
        raise UserError(f"{found[0]} is empty; put the sentences there.")
    return pairs


def _find(folder: Path, split: str, language: str) -> Path:
    names = [f"{stem}.{language}{ending}" for stem in STEMS[split] for ending in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {names[0]} (nor {', '.join(names[1:])}).")


def _read_lines(path: Path) -> Iterator[str]:
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            # splitlines would also split at the line separators that web text has within a sentence
            yield from (line.rstrip("\n").strip() for line in lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _read_parquet(paths: Iterable[Path], source: str, target: str) -> Pairs:
    from pyarrow import parquet

    pairs = Pairs([], [])
    for path in paths:
        for pair in parquet.read_table(path, columns=["translation"]).column("translation").to_pylist():
            for sentences, language in zip(pairs, (source, target), strict=True):
                # a newline within a sentence would be two lines of a file
                sentences.append(" ".join(pair[language].split()))
    return pairs


def sha256_of_pairs(splits: dict[str, Pairs]) -> str:
    """Return the SHA-256 of all sentences of all splits."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for sentences in splits[split]:
            digest.update("\n".join((split, *sentences, "")).encode())
    return digest.hexdigest()
