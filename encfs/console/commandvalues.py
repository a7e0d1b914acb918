"""Values of options without what typer converts them by, pydantic: to load it takes longer than most commands.

What is plain is taken as it is, and everything else, wrong values above all, is left to typer. That relies on one
private attribute of typer's parameters; where a version has none, nothing changes but the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperCommand, TyperGroup

_INTEGER = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class Command(TyperCommand):
    """A command whose parameters convert plain values by themselves."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's."""
        _prepare(self.get_params(ctx))
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """The same for a program's own options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's."""
        _prepare(self.get_params(ctx))
        return super().parse_args(ctx, args)


def _prepare(parameters: Iterable[Any]) -> None:
    for parameter in parameters:
        if hasattr(parameter, "type_descriptor") and getattr(parameter, "_runtime_param", ...) is None:
            parameter._runtime_param = _Plain(parameter.type_descriptor)


class _Plain:
    """Stands where typer keeps how a parameter's values are converted."""

    def __init__(self, descriptor: Any) -> None:
        self._annotation = descriptor.annotation
        self._info = descriptor.parameter_info

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value as the annotation has it. Raises: what typer raises."""
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        try:
            if several and isinstance(value, list | tuple) and get_origin(self._annotation) is list:
                kind = get_args(self._annotation)[0]
                return [self._convert(one, kind) for one in value]
            if not several:
                return self._convert(value, self._annotation)
        except ValueError:
            pass  # typer says what is wrong with it
        param._runtime_param = None
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)

    def _convert(self, value: Any, kind: Any) -> Any:
        """Raises: ValueError where it is not plain, and typer has to look at it."""
        if self._info.parser is not None:
            return self._info.parser(value)
        if kind is str and type(value) is str:
            return value
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind is int and (type(value) is int or (type(value) is str and _INTEGER.fullmatch(value))):
            number = int(value)
            if (self._info.min is None or number >= self._info.min) and (
                self._info.max is None or number <= self._info.max
            ):
                return number
        raise ValueError
