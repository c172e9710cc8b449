"""Texts as numbers on disk: made once, whole or not at all, and mapped into memory, so that size costs nothing.

A folder ``<key>`` holds ``vocabulary.txt``, ``train.npy``, ``valid.npy``, ``test.npy`` and ``text.json``. The key is a
hash of the source files' contents, so that a changed text is another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fwp_lightning.data.corpora import SPLITS, KnownCorpus, LineCheck, Size, check_counts, read_lines
from fwp_lightning.data.download import sha256_of_file
from fwp_lightning.data.vocabulary import CHUNK_TOKENS, Ids, Vocabulary, WordCount
from fwp_lightning.errors import UserError, sentence_of

# raised when the same text would give other files
FORMAT = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class TokenizedText:
    """A vocabulary and the three splits as numbers."""

    vocabulary: Vocabulary
    tokens: dict[str, Ids]
    """``[N]`` each"""
    sha256: str
    """Of vocabulary and numbers: the same whether the text lay there plain, gzipped or as parquet"""


def tokenize_in_memory(lines: dict[str, Iterable[list[str]]]) -> TokenizedText:
    """Return a small text as numbers."""
    count = WordCount()
    first = np.concatenate(list(count.read_lines(lines["train"])))
    vocabulary, final = count.by_count()
    tokens = {"train": final[first].astype(vocabulary.dtype)}
    for split in SPLITS[1:]:
        tokens[split] = np.concatenate(list(vocabulary.encode_lines(lines[split], split)))
    return TokenizedText(vocabulary, tokens, sha256_of_text(vocabulary, tokens))


def sha256_of_text(vocabulary: Vocabulary, tokens: dict[str, Ids]) -> str:
    """Return the SHA-256 of a text as numbers: the words, one a line, then the numbers as 32-bit integers."""
    digest = hashlib.sha256("\n".join(vocabulary.words).encode())
    for split in SPLITS:
        digest.update(f"\n{split} {len(tokens[split])}\n".encode())
        for chunk in _chunks(tokens[split]):
            digest.update(chunk.astype("<i4").tobytes())
    return digest.hexdigest()


def _chunks(array: Ids) -> Iterator[Ids]:
    return (array[start : start + CHUNK_TOKENS] for start in range(0, len(array), CHUNK_TOKENS))


# --- on disk ---------------------------------------------------------------------------------------------------------


def open_token_files(
    files: dict[str, list[Path]], cache: Path, corpus: KnownCorpus | None = None, say: Say = lambda text: None
) -> TokenizedText:
    """Return the text of ``files``, memory-mapped; its token files are made in ``cache`` if they are not there.

    Raises ``UserError``: a file that cannot be read, words that the training text lacks, counts that are not those of
    ``corpus``.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / _key_of(files, cache)
        if not folder.is_dir():
            # a second process waits and then finds the folder
            with FileLock(cache / f".{folder.name}.lock"):
                if not folder.is_dir():
                    _make(files, folder, say)
        text, sizes = _open(folder)
    except OSError as error:
        raise UserError(f"token files cannot be made in {cache}: {sentence_of(error)}; make room there.") from error
    if corpus is not None:
        check_counts(corpus, sizes, len(text.vocabulary), files["train"][0].parent)
    return text


def _open(folder: Path) -> tuple[TokenizedText, dict[str, Size]]:
    facts = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    tokens = {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}
    sizes = {split: Size(**facts["sizes"][split]) for split in SPLITS}
    return TokenizedText(Vocabulary(words), tokens, facts["sha256"]), sizes


def _key_of(files: dict[str, list[Path]], cache: Path) -> str:
    """Return the key of the files' contents; a file that has not been touched since is not read again for it."""
    hashes = {split: [_sha256_once(path, cache) for path in paths] for split, paths in files.items()}
    return hashlib.sha256(json.dumps([FORMAT, hashes], sort_keys=True).encode()).hexdigest()[:16]


def _sha256_once(path: Path, cache: Path) -> str:
    state = path.stat()
    mark = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    note = cache / f".{hashlib.sha256(json.dumps(mark).encode()).hexdigest()[:16]}.sha256"
    if note.is_file() and len(known := note.read_text(encoding="ascii")) == 64:
        return known
    found = sha256_of_file(path)
    _write_whole(note, found)
    return found


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that others see all of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="ascii")
    partial.replace(path)


def _make(files: dict[str, list[Path]], folder: Path, say: Say) -> None:
    """Read the text once and write its token files; they are put in place together."""
    partial = folder.with_name(f".{folder.name}.part")
    # of a process that was killed: whoever makes these files holds their lock
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        sizes = {}
        say(f"reading {files['train'][0].name} (once)")
        vocabulary, sizes["train"] = _write_training_tokens(files["train"], partial)
        for split in SPLITS[1:]:
            check = LineCheck(_name_of(files[split]))
            lines = check.over(_lines_of(files[split]))
            _write_tokens(partial / f"{split}.npy", vocabulary.encode_lines(lines, check.source), vocabulary.dtype)
            sizes[split] = check.size
        (partial / "vocabulary.txt").write_text("\n".join(vocabulary.words) + "\n", encoding="utf-8")
        tokens = {split: np.load(partial / f"{split}.npy", mmap_mode="r") for split in SPLITS}
        facts = {
            "sizes": {split: asdict(size) for split, size in sizes.items()},
            "sha256": sha256_of_text(vocabulary, tokens),
        }
        (partial / "text.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_training_tokens(files: list[Path], folder: Path) -> tuple[Vocabulary, Size]:
    """Write the training text by first appearance, then once more by count, when the counts are known."""
    check, count = LineCheck(_name_of(files)), WordCount()
    raw = folder / "first.npy"
    _write_tokens(raw, count.read_lines(check.over(_lines_of(files))), np.dtype("<i4"))
    vocabulary, final = count.by_count()
    first = np.load(raw, mmap_mode="r")
    _write_tokens(folder / "train.npy", (final[chunk] for chunk in _chunks(first)), vocabulary.dtype)
    raw.unlink()
    return vocabulary, check.size


def _write_tokens(path: Path, chunks: Iterable[Ids], dtype: np.dtype[Any]) -> None:
    """Write chunks as one array to a .npy file, whose header, which names the length, comes first."""
    length = 0
    with path.open("wb") as sink:
        _write_header(sink, 0, dtype)
        for chunk in chunks:
            chunk.astype(dtype).tofile(sink)
            length += len(chunk)
        sink.seek(0)
        _write_header(sink, length, dtype)
        sink.flush()
        os.fsync(sink.fileno())


def _write_header(sink: Any, length: int, dtype: np.dtype[Any]) -> None:
    # numpy leaves room in the header for a first axis that grows
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(sink, header)


def _lines_of(files: list[Path]) -> Iterator[list[str]]:
    return chain.from_iterable(read_lines(path) for path in files)


def _name_of(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
