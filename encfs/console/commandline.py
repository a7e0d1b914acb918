"""How both programs' commands are declared on typer, once: common options, groups of options, the run of a command.

A command is a function whose parameters are typer arguments and options, a `Terminal`, and groups: dataclasses whose
fields are options, so that "the trust options" are written down in one place. Not a place for what commands do.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from encfs.console.commandvalues import Command, Group
from encfs.console.terminal import ProgressMode, Settings, Terminal, run, translated_errors
from encfs.errors import UsageError
from encfs.hardening import forbid_core_files
from encfs.units import parse_size


@dataclass(frozen=True, slots=True)
class CommonOptions:
    """What every command takes, before or behind its name."""

    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False
    progress: Annotated[
        ProgressMode | None,
        typer.Option(
            "--progress",
            metavar="auto|none|plain|fancy",
            help="How to show progress on standard error: auto draws bars on a terminal only.",
            show_choices=False,
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors on standard error.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also say what is being done.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and a traceback on failure.")] = False

    def settings(self) -> Settings:
        return Settings(
            json=self.json, progress=self.progress, debug=self.debug, quiet=self.quiet, verbose=self.verbose
        )


def size_option(*names: str, help: str, default: str | None = None) -> Any:  # noqa: A002 -- typer's own word
    """An option that takes a size (`encfs.units.parse_size`); its value is in bytes."""
    shown = f"{help}  [default: {default}]" if default else help
    return typer.Option(*names, metavar="SIZE", parser=parse_size, help=shown, show_default=False)


def value_option(*names: str, metavar: str, help: str) -> Any:  # noqa: A002 -- typer's own word
    """An option that takes a value and says what happens without it, if anything, in `help`."""
    return typer.Option(*names, metavar=metavar, help=help, show_default=False)


def application(program: str, about: str) -> typer.Typer:
    """An empty program with the options that come before the command."""
    app = typer.Typer(
        name=program,
        cls=Group,
        help=about,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback()(_expanded(_options))
    return app


def _show_version(context: typer.Context, value: bool) -> None:
    if value:
        from importlib.metadata import version

        sys.stdout.write(f"{context.find_root().info_name} {version('encfs')}\n")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What comes before the name of a command: `_expanded` takes the settings over."""


def add_command(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Declare a command. The function's docstring is its help."""
    app.command(name, cls=Command)(_expanded(function))


def add_module(app: typer.Typer, module: ModuleType) -> None:
    """Declare the command that a module is about: its function `command`, under the module's own name."""
    add_command(app, module.__name__.rpartition(".")[2].replace("_", "-"), module.command)


def assemble(program: str, about: str, package: str, names: Sequence[str], words: Sequence[str] = ()) -> typer.Typer:
    """The program whose commands are the modules of `package`; the one that `words` begin with alone: others take time.

    `names` are those of commands, in the order of the help. A module has a `command`, or is an `app` with several.
    """
    made = application(program, about)
    named = next((word for word in words if not word.startswith("-")), "")
    for name in [named] if named in names else names:
        module = import_module(f"{package}.{name.replace('-', '_')}")
        if hasattr(module, "app"):
            made.add_typer(module.app)
        else:
            add_module(made, module)
    return made


def main(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit."""
    # A crash must not leave keys in a file.
    forbid_core_files()
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal = Terminal(program)
    # Until the options are parsed: an error in them is to be shown the way that was asked for.
    terminal.configure(Settings(json="--json" in words, debug="--debug" in words))

    def call() -> int:
        try:
            code = app(words, prog_name=program, standalone_mode=False, obj=terminal)
        except typer.TyperException as error:
            raise _usage_error(error, program) from error
        return code if isinstance(code, int) else 0

    sys.exit(run(terminal, call))


def _usage_error(error: typer.TyperException, program: str) -> UsageError:
    message = " ".join(error.format_message().split()).rstrip(".").replace(": Value error, ", ": ")
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else program
    return UsageError(message[:1].lower() + message[1:], hint=f"see '{path} --help'")


def _expanded(function: Callable[..., None]) -> Callable[..., None]:
    """`function` as typer can read it: groups replaced by their fields, and the common options added."""
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, type[Any]] = {}
    terminals: list[str] = []
    own: list[str] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.annotation is Terminal:
            terminals.append(parameter.name)
        elif dataclasses.is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type):
            groups[parameter.name] = parameter.annotation
            parameters |= {field.name: field for field in _fields(parameter.annotation)}
        else:
            parameters[parameter.name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            own.append(parameter.name)
    ordered = [*parameters.values(), *_fields(CommonOptions)]

    def invoke(context: typer.Context, **values: Any) -> None:
        terminal: Terminal = context.find_root().obj
        with translated_errors():
            terminal.configure(terminal.settings.merged(_take(CommonOptions, values).settings()))
            arguments: dict[str, Any] = dict.fromkeys(terminals, terminal)
            arguments |= {name: _take(group, values) for name, group in groups.items()}
            arguments |= {name: values[name] for name in own}
            function(**arguments)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    invoke.__signature__ = inspect.Signature([context, *ordered])  # type: ignore[attr-defined]
    invoke.__annotations__ = {one.name: one.annotation for one in (context, *ordered)}
    invoke.__name__ = function.__name__
    invoke.__doc__ = function.__doc__
    return invoke


def words_of(options: object) -> list[str]:
    """The words of a command line that mean what a group of options holds."""
    hints = get_type_hints(type(options), include_extras=True)
    words: list[str] = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if value == field.default:
            continue
        option = hints[field.name].__metadata__[0]
        # typer keeps the first name where a default would be without Annotated.
        name = next(one for one in (option.default, *option.param_decls) if str(one).startswith("--"))
        for one in value if isinstance(value, list) else [value]:
            words += [name] if one is True else [name, str(one)]
    return words


def _fields(group: type[Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )


def _take(group: type[Any], values: dict[str, Any]) -> Any:
    return group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
