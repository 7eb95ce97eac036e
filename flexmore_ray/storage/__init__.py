"""Places by URI: s3:// and gs:// through pyarrow's filesystems, beside folders of this machine.

    open_path("results")          a `pathlib.Path`, as file:///results is
    open_path("s3://bucket/x")    a `RemotePath`: the same operations on objects

An object appears whole or not at all: it is written here first and then sent in one piece, and what failed for a
moment is sent again. `flexmore_ray.storage.cache` keeps copies of large ones.

Credentials are those of the process: ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, ``~/.aws``, the role of the
machine; for gs:// ``GOOGLE_APPLICATION_CREDENTIALS`` or the machine's account. They are never part of a URI, and a
`RemotePath` that is sent to another process carries its URI alone. ``AWS_ENDPOINT_URL`` names a server other than AWS.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fnmatch
import functools
import mmap
import os
import posixpath
import random
import re
import shutil
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from flexmore_ray.errors import FlexmoreError, UsageError

SCHEMES = ("s3", "gs")
READERS = 24  # threads that read many small objects; pyarrow holds 25 connections
_WAITS = (0.5, 2.0, 5.0)  # seconds between attempts, each of which tries thrice in pyarrow itself
_RETRY_SECONDS = 60.0  # after which no further attempt begins
_CONNECT_SECONDS, _STALL_SECONDS = 5.0, 20.0  # until a connection is up; without a byte on one
_PIECE_BYTES = 16 << 20  # of a large file, read at once by each of a few threads
_PIECES = 6
_BUFFER_BYTES = 8 << 20
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CREDENTIALS = (
    "give credentials by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "GOOGLE_APPLICATION_CREDENTIALS), ~/.aws/credentials, or the machine's role"
)

Result = TypeVar("Result")


class StorageError(FlexmoreError, OSError):
    """An object store does not answer, refuses, or lacks the bucket. Also an `OSError`, as of a failed disk."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageError, (self.strerror,)


class Stat(NamedTuple):
    """What `RemotePath.stat` tells."""

    st_size: int
    st_mtime: int
    """By the clock of the store, in whole seconds since 1970: listings and single objects tell other fractions."""


class RemotePath:
    """A place in an object store, with those operations of `pathlib.Path` that this package uses.

    A folder is what the names of objects share up to a slash: it need not be made, and is there once something is in
    it. Two of them are equal if their URIs are. Every operation may raise `StorageError`.

    Args:
        uri: scheme, bucket and key, such as ``s3://bucket/folder/file``.

    Raises:
        UsageError: another scheme, no bucket, credentials or options in the URI, or a key that leaves its bucket.
    """

    def __init__(self, uri: str) -> None:
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES:
            raise UsageError(f"{scheme}://: not a kind of storage; known are s3://, gs:// and file://")
        bucket, _, key = rest.partition("/")
        if "@" in bucket or ":" in bucket or "?" in rest or "#" in rest:  # not shown: there may be a key in it
            raise UsageError(
                f"{scheme}://...: a URI has a bucket and a path, and no credentials or options, which would end up in "
                f"logs; {CREDENTIALS}; AWS_ENDPOINT_URL and AWS_REGION say where"
            )
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"{scheme}://: the name of a bucket is needed behind it, got {bucket!r}")
        self._scheme, self._bucket = scheme, bucket
        self._key = posixpath.normpath(key).strip("/") if key.strip("/") else ""
        if self._key.split("/", 1)[0] == "..":
            raise UsageError(f"{scheme}://{rest}: leads out of its bucket")
        self._key = "" if self._key == "." else self._key
        self._info: fs.FileInfo | None = None  # what a listing said

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (str(self),)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(other) == str(self)

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | Path) -> RemotePath:
        return RemotePath(f"{self}/{name}")

    @property
    def _path(self) -> str:
        """Bucket and key, which is pyarrow's way to name an object."""
        return f"{self._bucket}/{self._key}" if self._key else self._bucket

    # ---- names

    @property
    def name(self) -> str:
        """The last part of the key; empty for a bucket."""
        return posixpath.basename(self._key)

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The last suffix of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder; of a bucket itself."""
        return RemotePath(f"{self._scheme}://{self._bucket}/{posixpath.dirname(self._key)}")

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket and parts of the key."""
        return tuple(self._path.split("/"))

    def resolve(self) -> RemotePath:
        """The same: a URI is absolute."""
        return self

    # ---- what is there

    def _find(self) -> Any:
        if self._info is None:
            return _attempt(self, lambda: _filesystem(self._scheme, self._bucket).get_file_info(self._path))
        return self._info

    def exists(self) -> bool:
        """Whether an object has this name, or one in this folder."""
        return bool(self._find().type != fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether an object has this name."""
        return bool(self._find().type == fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether anything is in this folder."""
        return bool(self._find().type == fs.FileType.Directory)

    def stat(self) -> Stat:
        """Size and time of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        info = self._find()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return Stat(info.size, info.mtime_ns // 10**9)

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly in this folder, in the order of the names; each knows its size from the listing."""
        selector = fs.FileSelector(self._path, allow_not_found=True)
        found = _attempt(self, lambda: _filesystem(self._scheme, self._bucket).get_file_info(selector))
        for info in sorted(found, key=lambda info: info.path):
            path = RemotePath(f"{self._scheme}://{info.path}")
            path._info = info
            yield path

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Those of `iterdir` whose name matches; a pattern has no slash."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    # ---- content

    def read_bytes(self) -> bytes:
        """All of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """

        def read() -> bytes:
            with _filesystem(self._scheme, self._bucket).open_input_file(self._path) as file:
                return bytes(file.read())

        return _attempt(self, read)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of an object, as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "rb") -> Any:
        """An object as a stream of bytes, for reading."""
        assert mode == "rb"
        system = _filesystem(self._scheme, self._bucket)
        return _attempt(self, lambda: system.open_input_stream(self._path, buffer_size=_BUFFER_BYTES))

    def copy_to(self, target: Path) -> None:
        """Copy an object into a file of this machine, in pieces, several at once.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: it changed meanwhile.
        """
        before = self.stat()
        system = _filesystem(self._scheme, self._bucket)
        file = _attempt(self, lambda: system.open_input_file(self._path))
        with target.open("wb") as out, file, ThreadPoolExecutor(max_workers=_PIECES) as pool:

            def piece(start: int) -> int:
                size = min(_PIECE_BYTES, before.st_size - start)
                return os.pwrite(out.fileno(), _attempt(self, lambda: file.read_at(size, start)), start)

            copied = sum(pool.map(piece, range(0, before.st_size, _PIECE_BYTES)))
            out.flush()
            os.fsync(out.fileno())
        if copied != before.st_size or RemotePath(str(self)).stat() != before:
            raise StorageError(f"{self}: changed while it was read; start again")

    def write_bytes(self, data: bytes | memoryview | mmap.mmap) -> None:
        """Write an object, which appears whole or not at all.

        pyarrow publishes what was written of a stream whenever that is closed, after an exception too. So everything is
        written in one call, on a thread that no interrupt reaches, and closed only behind it.
        """
        self._info = None
        with ThreadPoolExecutor(max_workers=1) as sender:
            _attempt(self, lambda: sender.submit(self._send, data).result())
        size = self.stat().st_size
        if size != len(data):
            self.unlink(missing_ok=True)
            raise StorageError(f"{self}: {size:,} bytes arrived of {len(data):,}; start again")

    def _send(self, data: bytes | memoryview | mmap.mmap) -> None:
        buffer = pa.py_buffer(data)
        stream = _filesystem(self._scheme, self._bucket).open_output_stream(self._path)
        stream.write(buffer)
        stream.close()

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object."""
        self._info = None
        try:
            _attempt(self, lambda: _filesystem(self._scheme, self._bucket).delete_file(self._path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with the first object in it."""


AnyPath = Path | RemotePath
"""A place on this machine, or in an object store."""


def open_path(text: str | AnyPath) -> AnyPath:
    """The place that a user named: a path, or a URI.

    Args:
        text: a path of this machine, or ``s3://``, ``gs://`` or ``file://``.

    Raises:
        UsageError: an unknown scheme, or what `RemotePath` refuses.
    """
    if isinstance(text, RemotePath):
        return text
    scheme, mark, rest = str(text).partition("://")
    if not mark or "/" in scheme or isinstance(text, Path):
        return Path(text)
    if scheme != "file":
        return RemotePath(str(text))
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise UsageError(f"{text}: file:// names a file of this machine, as file:///folder; got the machine {host}")
    return Path(urllib.request.url2pathname(f"/{path}"))


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """What lies in a folder under names that match, in the order of the names; nothing where there is no folder."""
    return sorted(folder.glob(pattern), key=str)


def is_remote(text: str | AnyPath) -> bool:
    """Whether a place is in an object store."""
    return isinstance(text, RemotePath) or str(text).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


# ------------------------------------------------------------------------------ the stores


def _filesystem(scheme: str, bucket: str) -> Any:
    """The client of a bucket where the environment says that it is."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _client(scheme, bucket, endpoint, region)


@functools.cache
def _client(scheme: str, bucket: str, endpoint: str | None, region: str | None) -> Any:
    """A client with the credentials of this process; None means what is usual."""
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=_RETRY_SECONDS))
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else fs.resolve_s3_region(bucket)),
        allow_delayed_open=True,  # an object of one piece is then one request
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_STALL_SECONDS,
    )


def _attempt(path: RemotePath, call: Callable[[], Result]) -> Result:
    """Ask a store, more than once where it fails for a moment.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: anything else, on one line.
    """
    end = time.monotonic() + _RETRY_SECONDS
    for wait in (*_WAITS, None):
        try:
            return call()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from None
        except OSError as error:
            text = " ".join(str(error).split())
            reason = next((said for sign, said in _FINAL.items() if sign in text), None)
            if reason or wait is None or time.monotonic() > end:
                raise StorageError(f"{path}: {reason or _unanswered(path, text)}") from None
            time.sleep(wait * random.uniform(0.5, 1.5))
    raise AssertionError


_FINAL = {
    "NO_SUCH_BUCKET": "no such bucket; make it first, or check its name and AWS_ENDPOINT_URL",
    "ACCESS_DENIED": f"no permission; {CREDENTIALS}",
    "HTTP status 403": f"no permission; {CREDENTIALS}",
    "INVALID_ACCESS_KEY_ID": f"unknown credentials; {CREDENTIALS}",
    "SIGNATURE_DOES_NOT_MATCH": f"wrong credentials; {CREDENTIALS}",
    "PermissionDenied": f"no permission; {CREDENTIALS}",
    "Could not create credentials": f"no credentials; {CREDENTIALS}",
}
"""What pyarrow's text says -> the reason and the way out, where trying again is of no use."""


def _unanswered(path: RemotePath, text: str) -> str:
    """Why a store gave no answer, from pyarrow's text."""
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        detail = text.rpartition("Details: ")[2][:200]
        where = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default endpoint"
        return f"no answer from {_without_credentials(where)} ({detail}); check AWS_ENDPOINT_URL and the network"
    return text[:400]


def _without_credentials(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def at_once(call: Callable[[AnyPath], Result], paths: Sequence[AnyPath]) -> list[Result]:
    """Results of a call on each path, in order; on many threads where they are in a store, which takes its time."""
    if not any(isinstance(path, RemotePath) for path in paths):
        return [call(path) for path in paths]
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        return list(pool.map(call, paths))


def write_object(path: RemotePath, write: Callable[[BinaryIO], object]) -> None:
    """Write an object by way of a file of this node.

    Args:
        path: the object; one that is there is replaced.
        write: writes the content into the open file.

    Raises:
        OSError: the node's disk is full, or the store does not take it; what was there before stays.
    """
    with tempfile.TemporaryFile(prefix="flexmore-") as file:
        write(file)
        file.flush()
        if not os.fstat(file.fileno()).st_size:
            path.write_bytes(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            path.write_bytes(content)


@contextlib.contextmanager
def output_folder(out: AnyPath, last: Sequence[str] = ()) -> Iterator[Path]:
    """A folder of this machine to write into: `out` itself, or one that is sent to `out` where the block ends well.

    Args:
        out: made if missing.
        last: names of files that say that the rest is complete: sent behind all others.
    """
    if isinstance(out, Path):
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="flexmore-") as name:
        yield Path(name)
        send_folder(Path(name), out, last)


def send_folder(folder: Path, out: RemotePath, last: Sequence[str] = ()) -> None:
    """Send every file of a folder; those named in `last` when all others have arrived."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def send(path: Path) -> None:
        def copy(file: BinaryIO) -> None:
            with path.open("rb") as content:
                shutil.copyfileobj(content, file)

        write_object(out / path.relative_to(folder).as_posix(), copy)

    with ThreadPoolExecutor(max_workers=_PIECES) as pool:
        list(pool.map(send, [path for path in files if path.name not in last]))
    for path in files:
        if path.name in last:
            send(path)
