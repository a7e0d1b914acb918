"""On-disk tables of uncompressed EROFS: constants, records, and the small codecs that reader and writer share.

Not here: any policy of layout (`metadata`, `sparse`) and any reading (`reader`). Source: the kernel's
documentation, filesystems/erofs, and `erofs_fs.h` as published with erofs-utils under the MIT licence. Everything is
little-endian; only single-device images of 4 KiB blocks are described.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from struct import Struct
from typing import Final

from encfs.errors import FormatError, UnsupportedError

BLOCK_BITS: Final = 12
BLOCK_SIZE: Final = 1 << BLOCK_BITS
#: Block addresses are 32 bits wide, and all ones means "no block".
MAX_BLOCKS: Final = (1 << 32) - 1
NULL_BLOCK: Final = (1 << 32) - 1

MAGIC: Final = 0xE0F5E1E2
SUPERBLOCK_OFFSET: Final = 1024
#: magic, checksum, compatible features, block bits, extension slots, root nid, inodes, epoch, fixed nanoseconds,
#: blocks, metadata block, shared xattr block, UUID, volume name, incompatible features, (reserved), extra devices,
#: (device slot), directory block bits, the rest reserved
SUPERBLOCK: Final = Struct("<IIIBBHQQIIII16s16sIHHHB37x")
COMPAT_MTIME: Final = 0x2
INCOMPAT_CHUNKED: Final = 0x4
#: What the reader understands beyond the basics.
INCOMPAT_KNOWN: Final = INCOMPAT_CHUNKED

#: Inodes are addressed in units of 32 bytes from the start of the metadata area.
NID_BITS: Final = 5
NID_UNIT: Final = 1 << NID_BITS
#: format, xattr units, mode, links, size, mtime (seconds from the epoch), u, ino, uid, gid, (reserved)
COMPACT_INODE: Final = Struct("<HHHHIIIIHHI")
#: format, xattr units, mode, (reserved), size, u, ino, uid, gid, mtime seconds, nanoseconds, links, (reserved)
EXTENDED_INODE: Final = Struct("<HHHHQIIIIqII16x")
FORMAT_EXTENDED: Final = 0x1
FORMAT_LAYOUT_SHIFT: Final = 1
FORMAT_LAYOUT_MASK: Final = 0x7
#: Bits of the inode format that are described here; others belong to later revisions.
FORMAT_KNOWN: Final = 0xF

LAYOUT_PLAIN: Final = 0
LAYOUT_INLINE: Final = 2
LAYOUT_CHUNKED: Final = 4
LAYOUTS: Final = frozenset({LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNKED})
#: Chunk information (`u` of chunk-based inodes): log2(chunk size / block size), and a flag for 8-byte indexes.
CHUNK_BITS_MASK: Final = 0x1F
CHUNK_INDEXES: Final = 0x20
CHUNK_KNOWN: Final = CHUNK_BITS_MASK | CHUNK_INDEXES
#: One entry of a block map, and one of an array of indexes: (high bits), device, block.
CHUNK_BLOCK: Final = Struct("<I")
CHUNK_INDEX: Final = Struct("<HHI")

#: nid, offset of the name in its block, file type, (reserved)
DIRENT: Final = Struct("<QHBx")
NAME_OFFSET: Final = Struct("<H")
#: Where a dirent's name offset stands within the record.
DIRENT_NAME_OFFSET: Final = 8
MAX_NAME: Final = 255
#: Longest path in an image (bytes): 1024 levels of the longest names. EROFS has no limit; walks need one.
MAX_PATH: Final = 1 << 18
#: Longest symbolic link target in bytes: PATH_MAX without the NUL.
MAX_TARGET: Final = 4095

#: name filter, number of shared entries, (reserved)
XATTR_HEADER: Final = Struct("<IB7x")
XATTR_SHARED_ID: Final = Struct("<I")
#: length of the name without its prefix, prefix index, size of the value
XATTR_ENTRY: Final = Struct("<BBH")
XATTR_ALIGNMENT: Final = 4
XATTR_PREFIXES: Final = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
#: Largest xattr area of an inode in bytes: its 16-bit count of 4-byte units, less one, behind the header.
MAX_XATTR_AREA: Final = XATTR_HEADER.size + XATTR_ALIGNMENT * (0xFFFF - 1)

TYPE_REGULAR: Final = 1
TYPE_DIRECTORY: Final = 2
TYPE_SYMLINK: Final = 7
#: Directory entry type by `stat.S_IFMT(mode)`.
FILE_TYPES: Final = {
    stat.S_IFREG: TYPE_REGULAR,
    stat.S_IFDIR: TYPE_DIRECTORY,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: TYPE_SYMLINK,
}

NANOSECONDS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Superblock:
    """The fields of a superblock that an image of this kind uses. `epoch` in seconds, `blocks` of 4 KiB."""

    root_nid: int
    inodes: int
    epoch: int
    epoch_nsec: int
    blocks: int
    metadata_block: int
    xattr_block: int
    uuid: bytes
    incompatible: int


def pack_superblock(superblock: Superblock) -> bytes:
    """Block 0 up to the end of the superblock.

    The checksum feature stays off: the field protects one block against accidents, and the whole image lies under a
    hash tree that protects every byte; kernels of every age mount without it.
    """
    return bytes(SUPERBLOCK_OFFSET) + SUPERBLOCK.pack(
        MAGIC,
        0,
        COMPAT_MTIME,
        BLOCK_BITS,
        0,
        superblock.root_nid,
        superblock.inodes,
        superblock.epoch,
        superblock.epoch_nsec,
        superblock.blocks,
        superblock.metadata_block,
        superblock.xattr_block,
        superblock.uuid,
        bytes(16),
        superblock.incompatible,
        0,
        0,
        0,
        0,
    )


def parse_superblock(data: bytes | memoryview) -> Superblock:
    """Parse the `SUPERBLOCK.size` bytes at `SUPERBLOCK_OFFSET`.

    Raises: FormatError where it is no EROFS superblock; UnsupportedError for compression, other block sizes and
    features that are not described here.
    """
    if len(data) < SUPERBLOCK.size:
        raise FormatError("EROFS image is too short for a superblock")
    (
        magic,
        _checksum,
        _compatible,
        block_bits,
        _extension_slots,
        root_nid,
        inodes,
        epoch,
        epoch_nsec,
        blocks,
        metadata_block,
        xattr_block,
        uuid,
        _name,
        incompatible,
        _reserved,
        extra_devices,
        _device_slot,
        directory_bits,
    ) = SUPERBLOCK.unpack_from(data)
    if magic != MAGIC:
        raise FormatError("not an EROFS image: wrong magic number")
    if block_bits != BLOCK_BITS:
        raise UnsupportedError(f"EROFS block size of 2^{block_bits} bytes is not supported, only 4096")
    if incompatible & ~INCOMPAT_KNOWN or extra_devices or directory_bits:
        raise UnsupportedError(
            f"EROFS image uses features that are not supported (incompatible features {incompatible:#x}, "
            f"{extra_devices} extra devices)",
            hint="only uncompressed single-device images can be read",
        )
    if epoch_nsec >= NANOSECONDS:
        raise FormatError("EROFS superblock states an impossible time")
    return Superblock(root_nid, inodes, epoch, epoch_nsec, blocks, metadata_block, xattr_block, uuid, incompatible)


def encode_device(rdev: int) -> int | None:
    """A device number in the kernel's `new_encode_dev` form (12 bits of major, 20 of minor); None where it does not
    fit."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major >= 1 << 12 or minor >= 1 << 20:
        return None
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_device(encoded: int) -> int:
    """The inverse of `encode_device`, as `os.makedev` has it."""
    return os.makedev((encoded >> 8) & 0xFFF, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


def align(offset: int, alignment: int) -> int:
    """`offset` rounded up to a multiple of `alignment`, a power of two."""
    return (offset + alignment - 1) & -alignment


def printable(path: bytes) -> str:
    """A path from an image or an input as one line for a message: undecodable and control characters escaped."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text) or "/"
