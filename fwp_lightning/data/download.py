"""Files from the internet: resumed where they broke off, checked by SHA-256, complete or absent."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from fwp_lightning.errors import UserError, sentence_of

Progress = Callable[[int, int | None], None]

CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 60.0
# tries in a row that bring not a single byte; a try that brings some counts anew
TRIES = 4
PAUSE_SECONDS = 2.0
# the header in which a model hub states the SHA-256 of a large file before it redirects to its storage
ANNOUNCED = "X-Linked-ETag"


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, and what is known of it beforehand."""

    url: str
    name: str
    """Its name here"""
    size: int | None = None
    """Bytes"""
    sha256: str | None = None
    """None: as the server states it"""


class _Broken(Exception):
    """A transfer that ended early and may be taken up again."""


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the hash that is announced on the way."""

    def __init__(self) -> None:
        self.announced: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Note the hash and follow."""
        self.announced = _sha256_in(headers) or self.announced
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _sha256_in(headers: Any) -> str | None:
    found = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', headers.get(ANNOUNCED, "").strip())
    return found[1] if found else None


def download(file: RemoteFile, folder: Path, progress: Progress = lambda done, total: None) -> Path:
    """Return the path of ``file`` in ``folder``, fetched if it is not there; what broke off before is taken up again.

    ``progress`` is called with the bytes that are here and those of the whole. A file under its own name is complete
    and checked. Raises ``UserError``: server not reached, transfer broken off, wrong size or hash.
    """
    target = folder / file.name
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a second process waits and then finds the file
        with FileLock(folder / ".lock"):
            if not target.is_file():
                partial = folder / f"{file.name}.part"
                announced = _fetch(file, partial, progress)
                _check(file, partial, file.sha256 or announced)
                partial.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {sentence_of(error)}; make room or change its rights.") from error
    return target


def _fetch(file: RemoteFile, partial: Path, progress: Progress) -> str | None:
    """Bring ``partial`` to its full length; return the SHA-256 that the server states, if it does."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            return _transfer(file, partial, progress)
        except _Broken as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= TRIES:
                kept = f"{_size(partial) / 1e6:.1f} MB are kept, run it again to go on"
                other = f"check the network and run it again, or put the file there as {partial.with_suffix('')}"
                advice = kept if _size(partial) else other
                raise UserError(f"{file.url} cannot be fetched: {error}; {advice}.") from error
            time.sleep(PAUSE_SECONDS * failures)


def _transfer(file: RemoteFile, partial: Path, progress: Progress) -> str | None:
    """Fetch what is missing once; raise ``_Broken`` where another try may help."""
    have = _size(partial)
    redirect = _Redirect()
    # identity: a range of a compressed transfer would be another range
    headers = {"Accept-Encoding": "identity", "User-Agent": "fwp_lightning"}
    request = urllib.request.Request(file.url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.build_opener(redirect).open(request, timeout=TIMEOUT_SECONDS) as response:
            announced = redirect.announced or _sha256_in(response.headers)
            resumed = response.status == http.client.PARTIAL_CONTENT
            have = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else file.size
            with partial.open("ab" if resumed else "wb") as sink:
                done = _copy(response, sink, have, total, progress)
    except urllib.error.HTTPError as error:
        return _refused(error, file, partial, redirect)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Broken(_reason(error)) from error
    if total is not None and done < total:
        raise _Broken(f"the transfer ended after {done:,} of {total:,} bytes")
    return announced


def _copy(response: Any, sink: IO[bytes], have: int, total: int | None, progress: Progress) -> int:
    progress(have, total)
    while chunk := response.read(CHUNK_BYTES):
        sink.write(chunk)
        have += len(chunk)
        progress(have, total)
    sink.flush()
    os.fsync(sink.fileno())
    return have


def _refused(error: urllib.error.HTTPError, file: RemoteFile, partial: Path, redirect: _Redirect) -> str | None:
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and _size(partial):
        # nothing is left to fetch: whether it is the right file, its hash and size will say
        return redirect.announced or _sha256_in(error.headers)
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _Broken(f"the server answers {error.code} {error.reason}") from error
    raise UserError(f"{file.url} cannot be fetched: the server answers {error.code} {error.reason}.") from error


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    return sentence_of(inner) if isinstance(inner, BaseException) else sentence_of(error)


def _check(file: RemoteFile, partial: Path, sha256: str | None) -> None:
    """Refuse, and remove, a file of the wrong size or hash."""
    problem = ""
    if file.size is not None and _size(partial) != file.size:
        problem = f"{_size(partial):,} bytes instead of {file.size:,}"
    elif sha256 is not None and (found := sha256_of_file(partial)) != sha256:
        problem = f"the SHA-256 {found} instead of {sha256}"
    if problem:
        partial.unlink()
        raise UserError(f"{file.name} from {file.url} has {problem}; it was removed, run it again to fetch it anew.")


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
