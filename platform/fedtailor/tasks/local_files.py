"""Where a data set lies on this machine, and its text files, plain or gzipped."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from fedtailor.core.errors import DataError

_BLOCK = 1 << 16


def local_folder(path: str | None, name: str) -> Path | None:
    """The folder of data set `name`: `path` (``task.path``), else $FEDTAILOR_DATA/name, else None (use the hub).

    Raises:
        DataError: the folder does not exist; says which of the two named it.
    """
    if path is not None:
        folder, origin = Path(path), "task.path"
    elif os.environ.get("FEDTAILOR_DATA"):
        folder, origin = Path(os.environ["FEDTAILOR_DATA"]) / name, "FEDTAILOR_DATA"
    else:
        return None
    if not folder.is_dir():
        raise DataError(f"{origin}: {folder} is not a folder; it should hold one folder per language")
    return folder


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file, decompressed if its name ends in ``.gz``.

    Raises:
        DataError: unreadable, truncated or damaged gzip, or not UTF-8; names file and line (of the
            decompressed text, from 1).
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = _gunzip(path, raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason} 0x{raw[error.start]:02x}") from error


def _gunzip(path: Path, raw: bytes) -> bytes:
    text = bytearray()
    try:
        while raw:
            stream = zlib.decompressobj(wbits=31)  # 31: gzip header and checksum
            for at in range(0, len(raw), _BLOCK):
                text += stream.decompress(raw[at : at + _BLOCK])
                if stream.eof:
                    raw = stream.unused_data + raw[at + _BLOCK :]
                    break
            else:
                raise EOFError("the stream has no end")
    except (EOFError, zlib.error) as error:
        line = text.count(b"\n") + 1
        raise DataError(f"{path}, line {line}: damaged or truncated gzip: {error}") from error
    return bytes(text)
