"""Generated messages: their members are those of csi.proto."""

from typing import Any

def __getattr__(name: str) -> Any: ...
