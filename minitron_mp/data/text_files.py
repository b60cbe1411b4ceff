"""Text files: their format by name, and opening them, packed or not, in any marked encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, cast

from minitron_mp.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Format = Literal["text", "lines", "json", "table"]

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "table",
}
"""Suffix -> format. text: one document. lines: a JSON object on each line. json: an array of
objects, or objects one after the other. table: columns."""

Unpacker = bz2.BZ2Decompressor | lzma.LZMADecompressor

UNPACKERS: dict[str, Callable[[], Unpacker]] = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}

PACKED_SUFFIXES = (".gz", *UNPACKERS, ".zst")

FORMATS_NOTE = f"{', '.join(FORMATS)}; all but .parquet also as {', '.join(PACKED_SUFFIXES)}"

INSTALL_PYARROW = "run `pip install minitron-mp[formats]`, which installs pyarrow"

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks and their encodings."""

PACKED_BEGINNINGS: dict[str, tuple[str, tuple[bytes, ...]]] = {
    ".gz": ("gzip", (b"\x1f\x8b",)),
    ".bz2": ("bzip2", (b"BZh",)),
    ".xz": ("xz", (b"\xfd7zXZ\x00", b"\x5d\x00\x00")),  # also its old format, lzma
    ".zst": (
        "zstd",
        (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))),
    ),
}
"""Suffix -> name of the packing, and the first bytes of its files."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

OTHER_CONTENTS = (
    (b"\x1f\x8b", "gzip data: add .gz to its name"),
    (b"BZh", "bzip2 data: add .bz2 to its name"),
    (b"\xfd7zXZ\x00", "xz data: add .xz to its name"),
    (b"\x28\xb5\x2f\xfd", "zstd data: add .zst to its name"),
    (b"PAR1", "a parquet file: name it .parquet"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"%PDF", "a PDF document: convert it to text"),
)
"""First bytes of files that are not text in spite of their name."""

HEAD_BYTES = 4096
MAX_NUL_SHARE = 0.1
"""Share of NUL bytes in the first bytes of a file above which it is not text."""

CHUNK_BYTES = 1 << 20

PACKED_BYTES = 1 << 15
"""Packed bytes that are read together. The rest of them is copied at the end of each stream."""


class NotText(InputError):
    """A file has bytes that are not text in its encoding."""


class PackedStreams(io.RawIOBase):
    """Reads all streams of a .bz2 or .xz file.

    BZ2File and LZMAFile ignore the rest of a file after the first bytes that are no stream. Here
    these bytes are an error, except NUL bytes at the end of the file, and between streams of xz.
    """

    def __init__(self, path: Path, unpacker: Callable[[], Unpacker]) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._new_unpacker = unpacker
        self._unpacker = unpacker()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        """Read unpacked bytes. EOFError if the file ends within a stream."""
        with memoryview(buffer) as view:
            while True:
                packed = b""
                if self._unpacker.eof:
                    packed = self._next_stream()
                    if not packed:
                        return 0
                elif self._unpacker.needs_input:
                    packed = self._file.read(PACKED_BYTES)
                    if not packed:
                        raise EOFError("the file ends within a compressed stream")
                unpacked = self._unpacker.decompress(packed, len(view))
                if unpacked:
                    view[: len(unpacked)] = unpacked
                    return len(unpacked)

    def _next_stream(self) -> bytes:
        """Start a stream, and return its first bytes; b"" at the end of the file."""
        packed = self._unpacker.unused_data or self._file.read(PACKED_BYTES)
        has_padding = packed.startswith(b"\0")
        while packed and not packed.lstrip(b"\0"):
            packed = self._file.read(PACKED_BYTES)
        if not packed:
            return b""
        self._unpacker = self._new_unpacker()
        if has_padding and isinstance(self._unpacker, bz2.BZ2Decompressor):
            raise EOFError("NUL bytes between its compressed streams")
        return packed.lstrip(b"\0")


def format_of(name: str) -> Format | None:
    """Return the format of a file by its name, or None if it is no text file."""
    suffix = Path(unpacked_name(name)).suffix.lower()
    if suffix == ".parquet" and unpacked_name(name) != name:
        return None
    return FORMATS.get(suffix)


def unpacked_name(name: str) -> str:
    """Return the name without the suffix of its packing: a.jsonl for a.jsonl.gz."""
    for suffix in PACKED_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as text without its byte order mark. Line ends are translated to \\n.

    InputError if the file vanishes, changes while it is read, is damaged, or is not text.
    """
    with reading(path), open_bytes(path) as file:
        mark, encoding = _skip_mark(file, path)
        try:
            yield io.TextIOWrapper(file, encoding)
        except UnicodeDecodeError as error:
            raise NotText(_encoding_problem(path, encoding, len(mark))) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise errors of the file as InputError with its name. A file that changes in the block is one."""
    try:
        before = os.stat(path)
        yield
        after = os.stat(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} vanished while the text was read; restore it, and run again") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(_damage(path, error)) from error
    except OSError as error:
        if error.errno is None:  # of gzip, bz2 and pyarrow, about the content
            raise InputError(_damage(path, error)) from error
        raise InputError(
            f"{path} cannot be read: {error.strerror}; make it readable, or remove it"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(
            f"{path} changed while it was read ({before.st_size:,} bytes before, {after.st_size:,} after); "
            "wait until it is complete, or give a copy"
        )


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file, and unpack it by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in PACKED_SUFFIXES or os.path.getsize(path) == 0:
        return path.open("rb")
    if suffix == ".zst":
        return io.BufferedReader(_open_zstd(path), CHUNK_BYTES)
    opened = gzip.GzipFile(path) if suffix == ".gz" else PackedStreams(path, UNPACKERS[suffix])
    # GzipFile reads like a raw file. This buffer is faster than its own, which is in Python.
    return io.BufferedReader(cast(io.RawIOBase, opened), CHUNK_BYTES)


def _open_zstd(path: Path) -> io.RawIOBase:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(
            f"{path} needs pyarrow to be read, which cannot be imported ({error}); {INSTALL_PYARROW}"
        ) from error
    return pyarrow.input_stream(str(path), compression="zstd")


def _damage(path: Path, error: Exception) -> str:
    suffix = path.suffix.lower()
    if suffix in PACKED_BEGINNINGS:
        packing, beginnings = PACKED_BEGINNINGS[suffix]
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head.startswith(LFS_POINTER):
            return _lfs_pointer(path)
        if not any(head.startswith(beginning[: len(head)]) for beginning in beginnings):
            return (
                f"{path} is not {packing} data; if it is already unpacked, remove {path.suffix} from its name"
            )
    advice = "create or copy it again"
    if "too much memory" in str(error):  # of zstd, for frames with a long window
        advice = "unpack it with `zstd -d --long=31`"
    return f"{path} is damaged or cut off ({error}); {advice}"


def _skip_mark(file: io.BufferedReader, path: Path) -> tuple[bytes, str]:
    """Skip the byte order mark of an open file, and return it with the encoding.

    Without a mark the encoding is UTF-8. InputError if the first bytes are not text.
    """
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    for mark, encoding in MARKS:
        if head.startswith(mark):
            file.read(len(mark))
            return mark, encoding
    _refuse_other_content(head, path)
    return b"", "utf-8"


def _refuse_other_content(head: bytes, path: Path) -> None:
    """Raise InputError if the first bytes of a file without a mark are not text."""
    if head.startswith(LFS_POINTER):
        raise InputError(_lfs_pointer(path))
    has_many_nul = head.count(0) > MAX_NUL_SHARE * len(head)
    if not has_many_nul and _is_utf8(head):
        return
    for beginning, content in OTHER_CONTENTS:
        if head.startswith(beginning):
            raise InputError(f"{path} is not text but {content}")
    if not has_many_nul:
        return  # the reader names the invalid byte
    for first, encoding in ((0, "UTF-16BE"), (1, "UTF-16LE")):
        if head[first::2].count(0) > 0.5 * len(head[first::2]) > head[1 - first :: 2].count(0):
            raise InputError(
                f"{path} seems to be {encoding} without a byte order mark; convert it: "
                f"iconv -f {encoding} -t UTF-8"
            )
    raise InputError(f"{path} begins with {head.count(0):,} NUL bytes, so it is not text; replace the file")


def _lfs_pointer(path: Path) -> str:
    return f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`"


def _is_utf8(head: bytes) -> bool:
    """Return whether bytes are the beginning of UTF-8 text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _encoding_problem(path: Path, encoding: str, mark_bytes: int) -> str:
    """Return a sentence with the line and the position of the first invalid byte.

    The file is read again, because the error of the fast reader has no position in the file.
    """
    lines = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    number = 1
    offset = mark_bytes
    with open_bytes(path) as file:
        file.read(mark_bytes)
        chunk = file.read(CHUNK_BYTES)
        while True:
            following = file.read(CHUNK_BYTES)
            offset += len(chunk)
            try:
                number += lines.decode(chunk, not following).count("\n")
            except UnicodeDecodeError as error:
                number += _num_line_ends(error.object[: error.start].decode(encoding))
                offset -= len(error.object) - error.start
                return (
                    f"{path} is not {encoding.upper()} text: line {number}, byte "
                    f"0x{error.object[error.start]:02x} at offset {offset:,} ({error.reason}); convert the "
                    "file, for example with iconv, or correct these bytes"
                )
            if not following:
                return f"{path} is not {encoding.upper()} text; convert it, for example with iconv"
            chunk = following


def _num_line_ends(text: str) -> int:
    return text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
