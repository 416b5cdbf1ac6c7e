"""Messages between two processes: JSON, and bytes beside it. Nothing in a message can run."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")
BYTES = "\0bytes"  # in JSON: the length of bytes that follow it


def write_frame(stream: BinaryIO, message: Any) -> None:
    """Write JSON values in which there may be bytes too."""
    blobs: list[bytes] = []

    def plain(part: Any) -> Any:
        if isinstance(part, bytes):
            blobs.append(part)
            return {BYTES: len(part)}
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        return [plain(each) for each in part] if isinstance(part, list | tuple) else part

    text = json.dumps(plain(message)).encode()
    stream.write(b"".join([LENGTH.pack(len(text)), text, *blobs]))
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """The next message, its tuples as lists. Raises EOFError where the stream ends."""
    (length,) = LENGTH.unpack(_exactly(stream, LENGTH.size))

    def whole(part: Any) -> Any:
        if isinstance(part, dict):
            if BYTES in part:
                return _exactly(stream, part[BYTES])
            return {key: whole(each) for key, each in part.items()}
        return [whole(each) for each in part] if isinstance(part, list) else part

    return whole(json.loads(_exactly(stream, length)))


def _exactly(stream: BinaryIO, length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content
