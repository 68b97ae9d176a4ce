"""What a commit may hold and how it becomes bytes: safetensors, Parquet, or plain bytes. Never pickle."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedtailor.core.errors import StorageError, reported_as
from fedtailor.storage.files import safe_path

Array = npt.NDArray[Any]
Payload: TypeAlias = bytes | Mapping[str, Array] | pa.Table
Entries: TypeAlias = list[tuple[str, dict[str, Any]]]
Extent: TypeAlias = Mapping[str, tuple[int, ...]] | int
"""Shape of each tensor by name, the number of rows of a table, or the number of bytes."""

TENSORS, TABLE = ".safetensors", ".parquet"
MAX_HEADER = 16 * 2**20
"""Bytes of the largest safetensors header that is read; a header of 300 tensors has 30 kB."""

_DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip

_WRITABLE = {np.dtype(code) for code in _DTYPES.values()}


def canonical_json(value: Any) -> bytes:
    """The one way in which a JSON value is written where bytes matter.

    Raises:
        StorageError: not JSON: a type it does not know, NaN or Inf.
    """
    with reported_as(StorageError, "a record must be JSON", TypeError, ValueError):
        plain = json.loads(json.dumps(value, allow_nan=False))
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sha256(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


def encode(name: str, payload: Payload) -> tuple[str, bytes]:
    """Turns a payload into the bytes of a file; equal payloads give equal bytes.

    Returns:
        The object's name, with the format's extension added where it lacks it, and the content.

    Raises:
        StorageError: unsafe name, or a type that is not a Payload.
    """
    safe_path(name)
    if isinstance(payload, bytes):
        return name, payload
    if isinstance(payload, pa.Table):
        buffer = io.BytesIO()
        pq.write_table(payload.combine_chunks(), buffer, compression="zstd")
        return name.removesuffix(TABLE) + TABLE, buffer.getvalue()
    if isinstance(payload, Mapping):
        return name.removesuffix(TENSORS) + TENSORS, save(
            {key: _dense(name, key, payload[key]) for key in sorted(payload)}
        )
    raise StorageError(f"{name}: a commit holds bytes, arrays or tables, not {type(payload).__name__}")


def inspect(name: str, data: bytes) -> tuple[str, Extent]:
    """Parses a file as its extension says and hashes its *values*.

    Tensors: name, dtype, shape and bytes of each, by name. Tables: name, type and values of each column.
    The hash does not depend on the writing library, compression or metadata. Other files: of all bytes.

    Returns:
        Hex hash of the values, and how much there is.

    Raises:
        StorageError: does not parse, or a tensor has a value that is not finite.
    """
    if name.endswith(TENSORS):
        entries = _entries(name, data)
        return _tensor_content(name, entries), {key: tuple(entry["shape"]) for key, entry in entries}
    if name.endswith(TABLE):
        table = read_table(name, data)
        return _table_content(table), table.num_rows
    return sha256(data), len(data)


def extent(name: str, payload: Payload) -> Extent | None:
    """What `inspect` must find of a payload; None for bytes in a format, which are parsed but not known."""
    if isinstance(payload, bytes):
        return None if name.endswith((TENSORS, TABLE)) else len(payload)
    if isinstance(payload, Mapping):
        return {key: np.shape(array) for key, array in payload.items()}
    return int(payload.num_rows)


def read_tensors(name: str, data: bytes) -> dict[str, Array]:
    """Arrays of a safetensors file, own copies.

    Raises:
        StorageError: damaged, a header above MAX_HEADER, or a dtype that NumPy lacks (bfloat16).
    """
    arrays = {}
    for key, entry in _entries(name, data):
        if entry["dtype"] not in _DTYPES:
            raise StorageError(f"{name}: tensor '{key}' has dtype {entry['dtype']} (allowed: {', '.join(_DTYPES)})")
        flat = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]])
        arrays[key] = flat.reshape(entry["shape"])
    return arrays


def read_table(name: str, data: bytes) -> pa.Table:
    """Table of a Parquet file.

    Raises:
        StorageError: damaged.
    """
    with reported_as(StorageError, f"{name} is not a readable Parquet file", pa.ArrowException, OSError):
        return pq.read_table(io.BytesIO(data), use_threads=False)


def _entries(name: str, data: bytes) -> Entries:
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER, len(data) - 8):
        raise StorageError(f"{name}: refused: safetensors header of {header} bytes in {len(data)}")
    with reported_as(StorageError, f"{name} is not a readable safetensors file", SafetensorError, UnicodeDecodeError):
        return sorted(deserialize(data))  # type: ignore[no-untyped-call]


def _tensor_content(name: str, entries: Entries) -> str:
    total = hashlib.sha256()
    for key, entry in entries:
        code = _DTYPES.get(entry["dtype"], "")
        if entry["dtype"] == "BF16":
            # All eight exponent bits set is Inf or NaN.
            finite = not ((np.frombuffer(entry["data"], "<u2") & 0x7F80) == 0x7F80).any()
        else:
            finite = "f" not in code or np.isfinite(np.frombuffer(entry["data"], code)).all()
        if not finite:
            raise StorageError(f"{name}: tensor '{key}' has values that are not finite (NaN or Inf)")
        total.update(canonical_json([key, entry["dtype"], list(entry["shape"])]))
        total.update(entry["data"])
    return total.hexdigest()


def _table_content(table: pa.Table) -> str:
    total = hashlib.sha256()
    for field in table.schema:
        column = table.column(field.name).combine_chunks()
        null = np.asarray(column.is_null().to_numpy(zero_copy_only=False), dtype=bool)
        total.update(canonical_json([field.name, str(field.type), len(column)]) + null.tobytes())
        if pa.types.is_floating(field.type):
            values = column.fill_null(0.0).to_numpy(zero_copy_only=False)
            total.update(np.where(np.isnan(values), np.nan, values).astype("<f8").tobytes())
        elif pa.types.is_integer(field.type):
            total.update(column.fill_null(0).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        else:
            total.update(canonical_json(column.to_pylist()))
    return total.hexdigest()


def _dense(name: str, key: str, array: Array) -> Array:
    array = np.asarray(array)
    if array.dtype.newbyteorder("<") not in _WRITABLE:
        raise StorageError(f"{name}: tensor '{key}' has dtype {array.dtype} (allowed: {', '.join(_DTYPES)})")
    # ascontiguousarray would make a scalar one-dimensional; a scalar is contiguous anyway.
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
