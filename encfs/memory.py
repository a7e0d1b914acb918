"""Memory for large results: where it comes from, and taking its pages in batches rather than fault by fault.

A large array is written once, straight after it was allocated, so that every page of it is new. On a machine with fast
decryption those page faults cost as much as the cipher. `populate` takes the pages of a stretch in one call;
`fresh_bytes` gives memory that follows the system's policy for huge pages, where NumPy always asks for them: in a
virtual machine whose free memory goes back to its host (free page reporting), huge pages are exactly what the host has
to back first, several times slower than pages that were in use a moment ago.

Not here: memory that is locked or wiped (`hardening`, `keys.secrets`).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

#: madvise(2), since Linux 5.14; Python's `mmap` does not name it.
_MADV_POPULATE_WRITE = 23
_PAGE = mmap.PAGESIZE


def fresh_bytes(size: int) -> mmap.mmap:
    """`size` > 0 zero bytes of private memory, given back when nothing refers to them any more.

    Raises: MemoryError.
    """
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes of memory: {os.strerror(error.errno or 0)}") from None


def populate(buffer: memoryview) -> None:
    """Have the pages that lie whole in a writable `buffer` ready to be written; its content stays as it is.

    Where the kernel is too old, or memory is short, nothing happens: writing takes them one by one.
    """
    advise = _madvise()
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    start = -(-address // _PAGE) * _PAGE
    end = (address + len(buffer)) // _PAGE * _PAGE
    if end > start:
        advise(start, end - start, _MADV_POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    """The system's call; unlike that of `mmap` it lets other threads run meanwhile."""
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    result: Callable[[int, int, int], int] = call
    return result
