#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Removes the GPU code of other architectures from shared libraries, in place.

    prune.py ARCH LIBRARY...        ARCH is 90 for Hopper

The section .nv_fatbin is a row of fat binaries, each found through a pointer to its start, so each
has to stay where it is. Inside one, the entries that stay move up behind its header and its size is
lowered. The rest becomes zeros: the file keeps its size, and compresses to a fraction.

PTX stays only where there is no machine code for the architecture. A fat binary of which nothing
would stay keeps its smallest entry, since an empty one is refused.
"""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path
from typing import NamedTuple

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2


class Entry(NamedTuple):
    """The code of one kind for one architecture; `start` and `end` are offsets in the file."""

    kind: int
    arch: int
    start: int
    end: int


def section(data: mmap.mmap, wanted: bytes) -> tuple[int, int]:
    """Where a section of a 64-bit little-endian ELF file starts and ends; (0, 0) without one."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if data[start : data.find(b"\0", start)] == wanted:
            return header[4], header[4] + header[5]
    return 0, 0


def entries(data: mmap.mmap, start: int, end: int) -> list[Entry]:
    found = []
    while start < end:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, start)
        (arch,) = struct.unpack_from("<I", data, start + 28)
        if kind not in (PTX, MACHINE_CODE) or not 32 <= header <= 4096:
            raise SystemExit(f"offset {start:#x}: expected an entry of a fat binary")
        found.append(Entry(kind, arch, start, start + header + size))
        start += header + size
    return found


def kept(found: list[Entry], arch: int) -> list[Entry]:
    """What a device of this architecture may run, otherwise the smallest entry."""
    exact = [e for e in found if e.kind == MACHINE_CODE and e.arch == arch]
    if exact:
        return exact
    others = [e for e in found if e.arch <= arch and (e.kind == PTX or e.arch // 10 == arch // 10)]
    return others or sorted(found, key=lambda e: e.end - e.start)[:1]


def prune(path: Path, arch: int) -> tuple[int, int]:
    """Returns the bytes of GPU code before and after."""
    before = after = 0
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        place, stop = section(data, b".nv_fatbin")
        while 0 <= (place := data.find(MAGIC, place, stop)):
            header, size = struct.unpack_from("<HQ", data, place + 6)
            start, end = place + header, place + header + size
            stay = b"".join(data[e.start : e.end] for e in kept(entries(data, start, end), arch))
            data[start:end] = stay.ljust(size, b"\0")
            struct.pack_into("<Q", data, place + 8, len(stay))
            before, after, place = before + size, after + len(stay), end
    return before, after


if __name__ == "__main__":
    for name in sys.argv[2:]:
        whole, left = prune(Path(name), int(sys.argv[1]))
        print(f"{name}: {whole >> 20} MiB of GPU code, {left >> 20} MiB kept")
