"""Downloads: resumed where they broke off, checked, and complete or absent; a corpus is fetched as a user does it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest

from fwp_lightning.cli import main
from fwp_lightning.data import corpora, download
from fwp_lightning.data.corpora import KNOWN_CORPORA, KnownCorpus, Size
from fwp_lightning.data.download import RemoteFile
from fwp_lightning.errors import UserError

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """A server of files on this machine, and how it is to behave."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range asked for"""
    break_after: list[int] = field(default_factory=list)
    """For the next answers: close the connection after so many bytes"""
    answers: list[int] = field(default_factory=list)
    """For the next requests: this status instead of the file"""
    ranges: bool = True
    announce: str = ""

    @property
    def ranges_asked_for(self) -> list[str | None]:
        return [asked for path, asked in self.requests if path.startswith("/stored")]


class Handler(http.server.BaseHTTPRequestHandler):
    """Redirects /name to /stored/name, as a hub does, and serves ranges from there."""

    server_state: ClassVar[Server]

    def do_GET(self) -> None:
        state, asked = self.server_state, self.headers.get("Range")
        state.requests.append((self.path, asked))
        name = self.path.removeprefix("/stored")
        if state.answers:
            self.send_error(state.answers.pop(0))
        elif name not in state.files:
            self.send_error(404)
        elif not self.path.startswith("/stored"):
            self.send_response(302)
            self.send_header("Location", f"/stored{name}")
            if state.announce:
                self.send_header("X-Linked-ETag", f'"{state.announce}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_content(state.files[name], asked)

    def send_content(self, content: bytes, asked: str | None) -> None:
        state = self.server_state
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + state.break_after.pop(0) if state.break_after else len(content)
        with contextlib.suppress(OSError):
            self.wfile.write(content[start:stop])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(download, "CHUNK_BYTES", 1000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        Handler.server_state = Server(f"http://127.0.0.1:{running.server_port}", {"/file": CONTENT})
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield Handler.server_state
        running.shutdown()
        thread.join()


def remote(server: Server, **known: Any) -> RemoteFile:
    return RemoteFile(url=f"{server.url}/file", name="file", **known)


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download.download(remote(server, sha256=SHA256), tmp_path, lambda *state: seen.append(state))
    assert path == tmp_path / "file"
    assert path.read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    before = len(server.requests)
    download.download(remote(server), tmp_path)
    assert len(server.requests) == before


def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.break_after = [40_000, 30_000]
    path = download.download(remote(server, sha256=SHA256), tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.ranges_asked_for == [None, "bytes=40000-", "bytes=70000-"]


def test_a_process_that_was_interrupted_is_taken_up_by_the_next(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done >= 50_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.download(remote(server, sha256=SHA256), tmp_path, interrupt)
    assert not (tmp_path / "file").exists()
    assert download.download(remote(server, sha256=SHA256), tmp_path).read_bytes() == CONTENT
    assert server.ranges_asked_for == [None, "bytes=50000-"]


def test_a_file_that_was_whole_but_not_checked_yet_is_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download.download(remote(server, sha256=SHA256, size=len(CONTENT)), tmp_path).read_bytes() == CONTENT
    assert server.ranges_asked_for == [f"bytes={len(CONTENT)}-"]


def test_a_server_without_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.break_after = False, [40_000]
    assert download.download(remote(server, sha256=SHA256), tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.answers = [503, 429]
    assert download.download(remote(server), tmp_path).read_bytes() == CONTENT


def test_what_never_arrives_says_how_much_is_kept(server: Server, tmp_path: Path) -> None:
    server.break_after = [40_000, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"ended after 40,000 of 102,400 bytes; 0\.0 MB are kept, run it again"):
        download.download(remote(server), tmp_path)
    assert (tmp_path / "file.part").stat().st_size == 40_000


@pytest.mark.parametrize("announced", [False, True], ids=["known", "announced"])
def test_a_wrong_hash_removes_the_file(announced: bool, server: Server, tmp_path: Path) -> None:
    expected = "0" * 64
    server.announce = expected if announced else ""
    with pytest.raises(UserError, match=f"has the SHA-256 {SHA256} instead of {expected}; it was removed"):
        download.download(remote(server, sha256=None if announced else expected), tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_hash_that_is_known_beforehand_outweighs_an_announced_one(server: Server, tmp_path: Path) -> None:
    server.announce = "0" * 64
    assert download.download(remote(server, sha256=SHA256), tmp_path).read_bytes() == CONTENT


def test_a_wrong_size_removes_the_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="102,400 bytes instead of 102,401"):
        download.download(remote(server, size=len(CONTENT) + 1), tmp_path)


def test_a_stale_part_of_another_file_is_found_out_and_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="run it again to fetch it anew"):
        download.download(remote(server, sha256=SHA256), tmp_path)
    assert download.download(remote(server, sha256=SHA256), tmp_path).read_bytes() == CONTENT


def test_a_missing_file_and_a_silent_server_are_one_sentence(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/nothing cannot be fetched: the server answers 404"):
        download.download(RemoteFile(f"{server.url}/nothing", "nothing"), tmp_path)
    # port 9 of this machine: nobody listens
    with pytest.raises(UserError, match=r"check the network and run it again, or put the file there as .*silent"):
        download.download(RemoteFile("http://127.0.0.1:9/silent", "silent"), tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken/file cannot be written"):
        download.download(remote(server), tmp_path / "taken")


# --- a corpus ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownCorpus:
    """A corpus of three lines on the server, in place of WikiText-2."""
    texts = {"train-00000-of-00002": [" a b \n", ""], "train-00001-of-00002": [" b c \n"]}
    texts |= {"validation-00000-of-00001": [" a \n"], "test-00000-of-00001": [" c \n"]}
    files = []
    for name, lines in texts.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        server.files[f"/{name}"] = content
        files.append(RemoteFile(f"{server.url}/{name}", f"{name}.parquet", len(content)))
    sizes = {"train": Size(3, 7), "valid": Size(1, 2), "test": Size(1, 2, hashlib.sha256(b"c\n").hexdigest())}
    known = KnownCorpus("wikitext-2", "Small", 4, sizes, tuple(files))
    monkeypatch.setitem(KNOWN_CORPORA, "wikitext-2", known)
    root = tmp_path / "project"
    (root / "experiments").mkdir(parents=True)
    monkeypatch.setenv("FWP_ROOT", str(root))
    return known


def test_fwp_download_fetches_checks_and_makes_token_files(
    small: KnownCorpus, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.break_after = [100]
    assert main(["download", "wikitext-2"]) == 0
    shown = capsys.readouterr().out
    assert "7 train, 2 valid, 2 test tokens, 4 words" in shown
    assert "Small: 0.0 of 0.0 MB" in shown
    data = tmp_path / "project" / "data"
    assert len(list((data / "wikitext-2").glob("*.parquet"))) == 4
    assert len(list((data / "tokens").glob("*/vocabulary.txt"))) == 1
    before = len(server.requests)
    assert main(["download", "wikitext-2"]) == 0
    assert len(server.requests) == before


def test_progress_over_all_files_grows_to_the_whole(small: KnownCorpus, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    corpora.fetch_corpus(small, tmp_path / "here", lambda *state: seen.append(state))
    whole = sum(file.size or 0 for file in small.files)
    assert {total for _, total in seen} == {whole}
    assert seen[-1][0] == whole
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_text_with_the_right_counts_but_other_words_is_refused(
    small: KnownCorpus, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    pyarrow.parquet.write_table(pyarrow.table({"text": [" b \n"]}), other)
    # of the same size, as the size is known beforehand
    content = other.read_bytes()
    assert len(content) == len(server.files["/test-00000-of-00001"])
    server.files["/test-00000-of-00001"] = content
    assert main(["download", "wikitext-2"]) == 2
    assert "test has the counts of Small but other words" in capsys.readouterr().err


def test_an_unknown_corpus_is_answered_with_the_known_ones(
    small: KnownCorpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "wikitext2"]) == 2
    assert "unknown corpus 'wikitext2'. Did you mean 'wikitext-2'?" in capsys.readouterr().err


def test_files_of_the_known_corpora_are_pinned_to_a_revision() -> None:
    for corpus in KNOWN_CORPORA.values():
        for file in corpus.files:
            assert "/resolve/b08601e04326c79dfdd32d625aee71d232d685c3/" in file.url
            assert file.size
        assert {split for split in corpora.SPLITS if any(file.name.startswith(split) for file in corpus.files)} == set(
            corpora.SPLITS
        )
