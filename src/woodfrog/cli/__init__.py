"""The command line, `woodfrog`. Presentation only: the SDK and the daemon do the work."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

__all__ = ["main"]

INTERRUPTED = 130


def _leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Entry point of the `woodfrog` program."""
    try:
        # While the commands load there is nothing to undo. A KeyboardInterrupt could come up in a callback of the
        # import system, where Python prints it and goes on.
        own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if own:
            signal.signal(signal.SIGINT, _leave)
        from woodfrog.cli import output
        from woodfrog.cli.commands import app

        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for other in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: a call is cancelled, an app is stopped
            if signal.getsignal(other) is signal.SIG_DFL:
                signal.signal(other, signal.default_int_handler)
        try:
            app()
        except Exception as e:
            if output.debugging():
                raise
            output.note(f"error: internal: {type(e).__name__}: {e} (WOODFROG_DEBUG=1 shows where; please report it)")
            sys.exit(output.OUR_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
