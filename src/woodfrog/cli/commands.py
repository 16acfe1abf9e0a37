"""The commands, put together; and what they have in common: errors are one line and an exit status."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

from woodfrog.cli import apps, call, containers, daemon, doctor, gpus, output, run, secrets, snapshots, store
from woodfrog.errors import WoodfrogError

__all__ = ["app"]


class _Commands(typer.core.TyperGroup):
    """Turns our errors into one line and an exit status, for every command below it."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt:
            output.note("interrupted")
            raise SystemExit(output.INTERRUPTED) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
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

# What follows FILE belongs to the function.
app.command(
    "run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(run.run)
app.command("deploy")(run.deploy)
app.command("call")(call.call)
app.add_typer(apps.app, name="app")
app.add_typer(containers.app, name="container")
app.add_typer(gpus.app, name="gpu")
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(store.app, name="store")
app.add_typer(secrets.app, name="secret")
app.add_typer(daemon.app, name="daemon")
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"woodfrog {doctor.own_version()}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
