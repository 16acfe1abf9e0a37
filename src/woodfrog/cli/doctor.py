"""`woodfrog doctor`: every requirement of this machine checked, each failure with its remedy.

The only part of the command line that looks at the machine itself: everything else asks the daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog import settings
from woodfrog.cli import output
from woodfrog.cli.remote import connect
from woodfrog.errors import DaemonError, WoodfrogError

if TYPE_CHECKING:
    from woodfrog.linux.requirements import Check, CriuState, Host

MARKS = {True: "ok", False: "FAIL", None: "?"}


def own_version() -> str:
    import woodfrog

    return str(getattr(woodfrog, "__version__", "unknown"))


def find_criu(explicit: str) -> CriuState:
    from woodfrog.linux.requirements import CriuState, probe_criu

    try:
        from woodfrog.criu import binary
    except ImportError as e:
        return CriuState(error=f"woodfrog's own part for CRIU cannot be imported: {e}")
    return probe_criu(lambda: binary.find_criu(Path(explicit) if explicit else None), remedy=binary.REMEDY)


def probe_host() -> Host:
    from woodfrog.linux.native import native_path
    from woodfrog.linux.requirements import probe

    config = settings.load()
    native = (native_path("woodfrog-init"),)
    return probe(state_dir=config.home, worker_uid=config.worker_uid, native=native, criu=find_criu(config.criu))


def daemon_health() -> dict[str, Any] | None:
    """What the running daemon says of itself; None when none runs."""
    try:
        return connect(start=False).health()
    except DaemonError as e:
        if e.code != "no-daemon":
            raise
        return None


def judge_daemon(health: dict[str, Any] | None, expected: str) -> Check:
    from woodfrog.linux.requirements import Check

    if health is None:
        return Check("daemon", True, False, "not running (started when needed)")
    running = str(health.get("version", "unknown"))
    if not health.get("intact", True):
        problem = f"pid {health.get('pid')} runs from {health.get('package')}, which is gone"
        return Check("daemon", False, False, problem, "the next command replaces it, or `woodfrog daemon stop`")
    if running != expected:
        return Check(
            "daemon",
            False,
            False,
            f"version {running} runs, {expected} is installed",
            "`woodfrog daemon restart`",
        )
    if not health.get("current", True):
        problem = f"pid {health.get('pid')} is older than its code in {health.get('package')}, which was updated"
        return Check("daemon", False, False, problem, "`woodfrog daemon restart`")
    return Check("daemon", True, False, f"version {running}, pid {health.get('pid')}")


def run_checks(
    probe: Callable[[], Host] = probe_host, health: Callable[[], dict[str, Any] | None] = daemon_health
) -> list[Check]:
    """All checks, in the order shown."""
    from woodfrog.linux.requirements import Check, judge

    checks = judge(probe())
    try:
        checks.append(judge_daemon(health(), own_version()))
    except WoodfrogError as e:
        checks.append(Check("daemon", False, False, e.message, str(e.fields.get("remedy") or "")))
    return checks


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check all that woodfrog needs of this machine.

    Exit status: 0, or 1 when something required is missing.
    """
    checks = run_checks()
    bad = [c for c in checks if c.required and c.ok is False]
    if as_json:
        output.show_json({"ok": not bad, "version": own_version(), "checks": [c.to_dict() for c in checks]})
    else:
        show(checks)
    if bad:
        raise typer.Exit(1)


def show(checks: list[Check]) -> None:
    colours = sys.stdout.isatty()
    width = max(len(c.name) for c in checks)
    for check in checks:
        mark = "note" if check.ok is False and not check.required else MARKS[check.ok]
        shown = f"{mark:<4}"
        if colours:
            shown = typer.style(shown, fg={"ok": "green", "FAIL": "red"}.get(mark, "yellow"))
        print(f"{shown}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            print(f"{'':6}{'':{width}}  → {check.remedy}")
    bad = sum(c.required and c.ok is False for c in checks)
    unknown = sum(c.ok is None for c in checks)
    tail = f"; {unknown} could not be tried" if unknown else ""
    print(f"\n{f'{bad} of {len(checks)} checks failed' if bad else 'this machine can run woodfrog'}{tail}")
