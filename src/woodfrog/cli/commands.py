"""The commands, put together; and what they have in common: errors are one line and an exit status."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from woodfrog.cli import output
from woodfrog.errors import SpecError, WoodfrogError

__all__ = ["app"]

_COMMANDS = {"run": "run", "deploy": "run", "call": "call", "doctor": "doctor"}
"""The module of each; the function has the command's name."""
_GROUPS = {
    "app": "apps",
    "container": "containers",
    "gpu": "gpus",
    "snapshot": "snapshots",
    "store": "store",
    "result": "results",
    "secret": "secrets",
    "volume": "volumes",
    "daemon": "daemon",
}
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What is wrong with a command line. Typer has it from click, or from a copy of its own."""
_ORDER = (*_COMMANDS, *_GROUPS)
_MODALS = {
    "config": "settings are environment variables: docs/settings.md",
    "dict": "keep shared data in a volume: `woodfrog volume`",
    "environment": "there is one; an app is known by its name",
    "launch": "use `woodfrog run`",
    "nfs": "use `woodfrog volume`",
    "profile": "there are no accounts; WOODFROG_HOST names another daemon",
    "queue": "keep shared data in a volume: `woodfrog volume`",
    "serve": "use `woodfrog run`, or `woodfrog deploy` after each change",
    "setup": "there are no accounts: `woodfrog doctor` tells what the machine lacks",
    "shell": "use `woodfrog container exec`",
    "token": "there are no accounts; WOODFROG_TOKEN is the daemon's",
}
"""Commands of Modal's, and what to do without them."""
# What follows FILE belongs to the function.
_SETTINGS = {
    "run": {"allow_extra_args": True, "allow_interspersed_args": False},
}


def _build(name: str) -> Any:
    """The command or group of that name, as part of a program without the others: they need not be loaded."""
    alone = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
    module = import_module(f"woodfrog.cli.{_COMMANDS.get(name) or _GROUPS[name]}")
    if name in _GROUPS:
        alone.add_typer(module.app, name=name)
    else:
        alone.command(name, context_settings=_SETTINGS.get(name))(getattr(module, name))
    return typer.main.get_group(alone).commands[name]


def _one_line(error: Any) -> str:
    """What is wrong, where, and what to do; Typer would show three lines, and in words of its parsers."""
    what = error.format_message().strip().rstrip(".")
    if found := re.match(r"Invalid value for (.+?): (.+)", what, re.DOTALL):
        where, why = found.groups()
        why = why.removeprefix("Value error, ").replace("Input should be ", "it has to be ").partition(", unable to")[0]
        what = f"{where.replace(chr(39), '')}: {why}"
    else:
        what = re.sub(r" \(Possible options: (.+)\)$", r"; did you mean \1?", what[:1].lower() + what[1:])
    context = getattr(error, "ctx", None)
    return " ".join(what.split()) + (f" (see `{context.command_path} --help`)" if context is not None else "")


def _refused(error: Any) -> Exception:
    """How the program ends for it."""
    if type(error).__name__ == "NoArgsIsHelpError":  # shows the help
        return error  # type: ignore[no-any-return]
    output.show_error(SpecError(_one_line(error), code="usage"))
    return typer.Exit(output.OUR_ERROR)


def _closed() -> typer.Exit:
    """Who reads the output has had enough."""
    with suppress(OSError, ValueError):  # not a real file: a test's
        stdout = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return typer.Exit(output.CLOSED)


class _Commands(typer.core.TyperGroup):
    """Builds the command that is asked for, and turns our errors into one line and an exit status."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_ORDER)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _MODALS:
            raise SpecError(f"Modal has a command {cmd_name!r}; woodfrog has none: {_MODALS[cmd_name]}", code="not-yet")
        for name in [cmd_name] if cmd_name in _ORDER else _ORDER:  # all of them for a guess at what was meant
            if name not in self.commands:
                self.commands[name] = _build(name)
        return self.commands.get(cmd_name)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except _UsageError as e:
            raise _refused(e) from None
        except BrokenPipeError:
            raise _closed() from None
        except KeyboardInterrupt:
            output.note("interrupted")
            raise SystemExit(output.INTERRUPTED) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            raise _closed() from None
        except _UsageError as e:
            raise _refused(e) from None
        except WoodfrogError as e:
            if output.debugging():
                import traceback

                traceback.print_exc()
            output.show_error(e)
            raise typer.Exit(output.exit_code(e)) from None
        except KeyboardInterrupt:
            output.note("interrupted")
            raise typer.Exit(output.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Freeze warmed-up Python functions and thaw copies of them in milliseconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from woodfrog.cli.doctor import own_version

        print(f"woodfrog {own_version()}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
