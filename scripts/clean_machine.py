"""Undo what set-up and the daemon left outside the clone.

Stops the daemon of the state directory, ends what still runs in its sandboxes, and removes its cgroups, network,
shared memory, state and the prefix with CRIU. Of the distribution's packages only those are removed that set-up itself
installed and nothing else has come to need since.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from system_packages import (
    DEFAULT_PREFIX,
    QUIET_APT,
    RECORD,
    SetupError,
    installed,
    on_path,
    recorded,
    require_root,
    say,
)

DEFAULT_STATE = Path("/var/lib/woodfrog")
NAME = "woodfrog"
CGROUPS = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")
RUN = Path("/run/woodfrog")
FORWARDING_WAS_OFF = "forwarding-was-off"
KDAT_LEFTOVERS = (Path("/run/criu.kdat"), Path("/run/criu.kdat.tmp"))


def owned_name(state: Path) -> re.Pattern[str]:
    """Return the names this clean-up may touch: all of woodfrog's, or one other state directory's own."""
    if state == DEFAULT_STATE:
        return re.compile(rf"{NAME}(?:[-_.].+)?")
    tag = sha256(str(state).encode()).hexdigest()[:8]
    return re.compile(rf"{NAME}[-_.]{tag}(?:[-_.].+)?")


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_ended(pids: set[int], seconds: float) -> set[int]:
    limit = time.monotonic() + seconds
    while (left := {pid for pid in pids if not ended(pid)}) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


def signal_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def daemon_pid(state: Path) -> int | None:
    """Ask the kernel who listens on the daemon's socket; a stale socket has nobody."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        try:
            client.connect(str(state / "woodfrogd.sock"))
        except OSError:
            return None
        pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid)


def stop_daemon(state: Path) -> None:
    pid = daemon_pid(state)
    if pid is None:
        return
    say("clean", f"stop the daemon (pid {pid})")
    signal_all({pid}, signal.SIGTERM)
    if wait_ended({pid}, 20):
        signal_all({pid}, signal.SIGKILL)
        wait_ended({pid}, 5)


def remove_cgroups(pattern: re.Pattern[str]) -> None:
    """Kill what is left in our cgroups, in every hierarchy, and remove them from the leaves up."""
    tops = []
    for directory, children, _ in os.walk(CGROUPS):
        ours = [name for name in children if pattern.fullmatch(name)]
        tops += [Path(directory, name) for name in ours]
        children[:] = [name for name in children if name not in ours]
    if not tops:
        return
    say("clean", f"remove {len(tops)} cgroups")
    groups = [Path(directory) for top in tops for directory, _, _ in os.walk(top, topdown=False)]
    for _ in range(20):
        pids: set[int] = set()
        for group in groups:
            with suppress(OSError):
                pids |= {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
            with suppress(OSError):
                (group / "freezer.state").write_text("THAWED")
        if not pids:
            break
        signal_all(pids, signal.SIGKILL)
        wait_ended(pids, 1)
    for group in groups:
        try:
            group.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise SetupError(f"cannot remove the cgroup {group}: {error.strerror}") from None


def network_names(command: list[str], expression: str) -> list[str]:
    if not on_path(command[0]):
        return []
    done = subprocess.run(command, capture_output=True, text=True)
    return re.findall(expression, done.stdout, re.MULTILINE)


def remove_network(pattern: re.Pattern[str], bridges: list[str]) -> None:
    tables = network_names(["nft", "list", "tables"], r"^table (\S+ \S+)")
    for table in tables:
        family, name = table.split()
        if pattern.fullmatch(name):
            say("clean", f"remove the nftables table {name}")
            subprocess.run(["nft", "delete", "table", family, name], check=False)
    for bridge in bridges:
        if Path("/sys/class/net", bridge, "bridge").is_dir():
            say("clean", f"remove the bridge {bridge}")
            subprocess.run(["ip", "link", "delete", bridge], check=False)


def unmount_below(directory: Path) -> None:
    """Detach every mount at or below a directory, so that removing it never reaches into something mounted there."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]))
        if point.is_relative_to(directory):
            points.append(point)
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", str(point)], check=False)


def remove_tree(path: Path) -> None:
    if not path.exists():
        return
    say("clean", f"remove {path}")
    unmount_below(path.resolve())
    shutil.rmtree(path)


def forwarding_off_again() -> None:
    """As it was before a daemon turned it on for its sandboxes."""
    if (RUN / FORWARDING_WAS_OFF).exists():
        say("clean", "turn IPv4 forwarding off, as it was before")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")


def remove_packages(prefix: Path) -> None:
    """Remove the packages that set-up installed. dpkg keeps, and names, those that something else needs."""
    ours = sorted(installed(recorded(prefix)) if recorded(prefix) else ())
    if not ours:
        return
    say("clean", f"remove {len(ours)} packages that set-up had installed: {' '.join(ours)}")
    subprocess.run(
        ["dpkg", "--purge", *ours],
        env=os.environ | QUIET_APT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kept = installed(ours)
    if kept:
        say("clean", f"keep {' '.join(sorted(kept))}: another package needs it")


def clean(prefix: Path, state: Path) -> None:
    pattern = owned_name(state)
    everything = state == DEFAULT_STATE
    stop_daemon(state)
    remove_cgroups(pattern)
    remove_network(pattern, ["wf0"] if everything else [])
    for entry in sorted(SHARED_MEMORY.iterdir()):
        if entry.is_dir() and pattern.fullmatch(entry.name):
            remove_tree(entry)
    remove_tree(state)
    if everything:
        forwarding_off_again()
        remove_tree(RUN)
    if (prefix / "criu").exists():
        for leftover in KDAT_LEFTOVERS if everything else ():
            leftover.unlink(missing_ok=True)
    remove_packages(prefix)
    (prefix / RECORD).unlink(missing_ok=True)
    remove_tree(prefix)


def refuse_foreign(path: Path, holds: set[str]) -> None:
    """A mistyped PREFIX or STATE must not cost anyone a directory of their own."""
    if len(path.parts) < 3 or path.resolve() != path:
        raise SetupError(f"{path} is not a directory of woodfrog's: nothing was removed")
    if path.exists() and any(path.iterdir()) and not holds & {entry.name for entry in path.iterdir()}:
        raise SetupError(f"{path} holds none of {', '.join(sorted(holds))}: not woodfrog's, nothing was removed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefix", type=Path, default=DEFAULT_PREFIX)
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE)
    options = parser.parse_args()
    prefix, state = options.prefix.absolute(), options.state.absolute()
    try:
        require_root("cleaning the machine")
        if prefix != DEFAULT_PREFIX:
            refuse_foreign(prefix, {"criu", RECORD})
        if state != DEFAULT_STATE:
            refuse_foreign(state, {"woodfrogd.sock", "snapshots", "journal.sqlite", "config.toml"})
        clean(prefix, state)
    except (SetupError, OSError) as error:
        print(f"clean: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
