"""Events of a TPM's event log for people: the names of their types, and one line of what their data says.

The data is untrusted: nothing is raised, and what does not read as it should is not shown. Sources: TCG PC Client
Platform Firmware Profile, 10.4.1 (types) and 10.2 (data); UEFI specification, 10.3 (device paths).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

NO_ACTION = 0x00000003

_NAMES: Mapping[int, str] = {
    0x00000000: "EV_PREBOOT_CERT",
    0x00000001: "EV_POST_CODE",
    NO_ACTION: "EV_NO_ACTION",
    0x00000004: "EV_SEPARATOR",
    0x00000005: "EV_ACTION",
    0x00000006: "EV_EVENT_TAG",
    0x00000007: "EV_S_CRTM_CONTENTS",
    0x00000008: "EV_S_CRTM_VERSION",
    0x00000009: "EV_CPU_MICROCODE",
    0x0000000A: "EV_PLATFORM_CONFIG_FLAGS",
    0x0000000B: "EV_TABLE_OF_DEVICES",
    0x0000000C: "EV_COMPACT_HASH",
    0x0000000D: "EV_IPL",
    0x0000000E: "EV_IPL_PARTITION_DATA",
    0x0000000F: "EV_NONHOST_CODE",
    0x00000010: "EV_NONHOST_CONFIG",
    0x00000011: "EV_NONHOST_INFO",
    0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000002: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    0x8000000C: "EV_EFI_VARIABLE_BOOT2",
    0x80000010: "EV_EFI_HCRTM_EVENT",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
    0x800000E1: "EV_EFI_SPDM_FIRMWARE_BLOB",
    0x800000E2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}
_LONGEST = 120
_LONGEST_VALUE = 8

# UEFI_VARIABLE_DATA: GUID, characters of the name, bytes of the value; UEFI_IMAGE_LOAD_EVENT: address, length, link
# time, bytes of the device path; a node of it: type, subtype, length of all of it.
_VARIABLE, _IMAGE, _NODE = struct.Struct("<16sQQ"), struct.Struct("<QQQQ"), struct.Struct("<BBH")
_MEDIA_FILE, _END_OF_PATH = (4, 4), 0x7F
_TAG = struct.Struct("<II")


def type_name(kind: int) -> str:
    """As the specification calls it, or its number."""
    return _NAMES.get(kind, f"{kind:#010x}")


def describe(kind: int, data: bytes) -> str:
    """One line of printable text; empty where there is nothing to say."""
    try:
        text = _READERS.get(kind, _nothing)(data)
    except (struct.error, UnicodeDecodeError, ValueError):
        return ""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _nothing(_data: bytes) -> str:
    return ""


def _hex(data: bytes) -> str:
    return data.hex() if len(data) <= _LONGEST_VALUE else ""


def _text(data: bytes) -> str:
    """ASCII, or UTF-16 where every other byte is zero; with or without a NUL at the end."""
    wide = len(data) >= 2 and len(data) % 2 == 0 and not any(data[1::2])
    text = data.decode("utf-16-le" if wide else "utf-8").rstrip("\0")
    return "".join(one if one.isprintable() else "?" for one in text)


def _variable(data: bytes) -> str:
    _, characters, size = _VARIABLE.unpack_from(data)
    end = _VARIABLE.size + 2 * characters
    if end + size > len(data):
        raise ValueError("the variable is longer than its event")
    name, value = _text(data[_VARIABLE.size : end]), data[end : end + size]
    return f"{name} = {value.hex()}" if len(value) <= _LONGEST_VALUE else f"{name}, {len(value)} bytes"


def _image(data: bytes) -> str:
    """Names of files in the device path of an image that was loaded."""
    *_, size = _IMAGE.unpack_from(data)
    path, names = data[_IMAGE.size : _IMAGE.size + size], []
    while path:
        kind, subtype, length = _NODE.unpack_from(path)
        if length < _NODE.size:
            raise ValueError("a node of the device path has no length")
        if kind == _END_OF_PATH:
            break
        if (kind, subtype) == _MEDIA_FILE:
            names.append(_text(path[_NODE.size : length]))
        path = path[length:]
    return "".join(names)


def _tagged(data: bytes) -> str:
    _, size = _TAG.unpack_from(data)
    return _text(data[_TAG.size : _TAG.size + size])


_READERS: Mapping[int, Callable[[bytes], str]] = {
    0x00000001: _text,
    0x00000004: _hex,
    0x00000005: _text,
    0x00000006: _tagged,
    0x00000008: _text,
    0x0000000D: _text,
    0x80000001: _variable,
    0x80000002: _variable,
    0x80000003: _image,
    0x80000004: _image,
    0x80000005: _image,
    0x80000007: _text,
    0x8000000C: _variable,
    0x800000E0: _variable,
}
