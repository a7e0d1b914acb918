"""The options behind a key URI, `?name=value&name=value`, as those schemes read them that name a service."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import parse_qsl

from encfs.errors import KeyFileError
from encfs.strictjson import show_name

_MAX_OPTIONS = 32


def query_options(
    query: str, scheme: str, known: Collection[str], *, hint: str, repeated: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Every option with its value, decoded; only `repeated` ones may stand there twice.

    Raises: KeyFileError with `hint`, also for an option without a value: a variable that a shell found empty would
    otherwise be no option at all.
    """
    try:
        pairs = (
            parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=_MAX_OPTIONS, errors="strict")
            if query
            else []
        )
    except ValueError:
        raise KeyFileError(f"the options of the {scheme}: URI are malformed", hint=hint) from None
    seen: set[str] = set()
    for name, value in pairs:
        if name not in known:
            raise KeyFileError(f"the {scheme}: URI has the option {show_name(name)}, which is not known", hint=hint)
        if name in seen and name not in repeated:
            raise KeyFileError(f"the {scheme}: URI has the option {name} twice", hint=hint)
        if not value or "\0" in value:
            raise KeyFileError(f"the option {name} of the {scheme}: URI has no value", hint=hint)
        seen.add(name)
    return pairs
