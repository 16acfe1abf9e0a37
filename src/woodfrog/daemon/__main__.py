"""woodfrogd: the composition root. Everything is chosen and put together here and nowhere else."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import grp
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

import woodfrog
from woodfrog import faults
from woodfrog.backends.factory import SandboxFactory
from woodfrog.backends.gpus import find_gpus
from woodfrog.backends.keeper import Keeper
from woodfrog.backends.local import LocalBackend, LocalConfig
from woodfrog.backends.zygote import ZygoteConfig
from woodfrog.control.gpus import Gpu
from woodfrog.criu.binary import REMEDY, Criu, find_criu
from woodfrog.daemon.api import TokenAuth, build
from woodfrog.daemon.connections import Local, Remote
from woodfrog.daemon.controller import Controller
from woodfrog.daemon.journal import Journal
from woodfrog.daemon.logs import LogBook, rotate_own
from woodfrog.daemon.memory import MemoryWatch
from woodfrog.daemon.resources import Resources
from woodfrog.daemon.room import Room
from woodfrog.daemon.shm import claim, sweep
from woodfrog.errors import DaemonError, HostError, SpecError, WoodfrogError
from woodfrog.linux import descriptors, heap, requirements
from woodfrog.linux.breakpoints import keep_quick
from woodfrog.linux.pageserver import page_server_path
from woodfrog.linux.sandbox import init_binary_path
from woodfrog.settings import Settings, load
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.compat import host_facts, worker_class
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import TrustStore
from woodfrog.store.cold import Key
from woodfrog.store.content import ContentStore
from woodfrog.store.layers import LayerFiles
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import open_tier

__all__ = ["main"]

log = logging.getLogger("woodfrog")

_TIDY_S = 15.0
_LEAVE_S = 5.0
_OWN_LOG = 16 << 20
_ROOM_LEFT = 1 << 20
"""What a start leaves free on a full disk, of what it was given."""
EVERYTHING_MIB = 1 << 40


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own way down."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _prepare_home(settings: Settings) -> int:
    """Make the state directory and take its lock; the lock's descriptor, never closed, lives as long as the daemon.

    Raises:
        DaemonError: another daemon has it.
        HostError: it cannot be made.
    """
    home = settings.home
    try:
        home.mkdir(parents=True, exist_ok=True)
        os.chmod(home, 0o711)
        fd = os.open(home / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise HostError(f"state directory {home}: {e.strerror}; set WOODFROG_HOME to another", code="state-dir") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "?"
        raise DaemonError(f"a daemon runs already for {home} (pid {pid})", code="already-running") from None
    with contextlib.suppress(OSError):  # it is for people, and a full disk has no room for it
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _unix_socket(settings: Settings) -> socket.socket:
    path = settings.socket
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as e:
        raise HostError(f"cannot listen on {path}: {e.strerror or e} (a path may have 107 bytes)", code="socket") from e
    finally:
        os.umask(old_mask)
    if settings.socket_group:
        try:
            gid = grp.getgrnam(settings.socket_group).gr_gid
        except KeyError:
            raise SpecError(f"setting socket_group: no group {settings.socket_group!r}", code="bad-setting") from None
        os.chown(path, 0, gid)
        os.chmod(path, 0o660)
    sock.listen(512)
    return sock


def _tcp_socket(settings: Settings) -> socket.socket | None:
    if not settings.listen:
        return None
    if not settings.token:
        raise SpecError("setting listen needs a token: set WOODFROG_TOKEN", code="bad-setting")
    host, _, port = settings.listen.rpartition(":")
    try:
        return socket.create_server((host or "127.0.0.1", int(port)), backlog=512)
    except (OSError, ValueError, OverflowError) as e:
        why = e if isinstance(e, OSError) else "expected ADDRESS:PORT"
        raise SpecError(f"setting listen: {settings.listen!r}: {why}", code="bad-setting") from None


def _check_host(settings: Settings) -> tuple[Criu, Settings]:
    """CRIU, and the settings this machine can follow. Refuses with the same words `woodfrog doctor` uses.

    Raises:
        HostError: the first required thing that is missing, with its remedy.
    """
    found: list[Criu] = []

    def find() -> Criu:
        found.append(find_criu(Path(settings.criu) if settings.criu else None))
        return found[0]

    criu = requirements.probe_criu(find, remedy=REMEDY, check=False)
    host = requirements.probe(
        state_dir=settings.home,
        worker_uid=settings.worker_uid,
        native=(init_binary_path(), page_server_path()),
        criu=criu,
    )
    checks = requirements.judge(host)
    # One that has been used may be full of what only its daemon can remove.
    used = {"disk"} if Journal.exists(settings.home) else set()
    requirements.demand([c for c in checks if c.name not in used])
    for check in checks:
        if check.ok is False and check.name in ("userfaultfd", *requirements.COLD_ONLY, *used):
            log.warning("%s: %s; %s", check.name, check.found, check.remedy)
    if host.userfaultfd != 0:
        # What is packed can only be thawed through the page server.
        settings = replace(settings, lazy_min_mib=EVERYTHING_MIB, pack=False)
    return found[0], settings


def _check_private(hot: Path) -> None:
    """It lies in /dev/shm, where everybody may make directories, under a name that can be guessed.

    Raises:
        HostError: somebody else made it.
    """
    for path in (hot.parent, hot):
        info = os.lstat(path)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise HostError(f"{path}: others may write there; remove it, or make it yours alone", code="state-dir")


def _keeper(settings: Settings, catalogue: Catalogue, store: PageStore, key: SigningKey, cls: str) -> Keeper:
    secret = None
    tier, budget = settings.tier, settings.snapshots_mib << 20
    if settings.encrypted:
        secret = Key.load(settings.encryption_key or Path(settings.encryption_key_file))
        # What is hot lies in memory alone: the tier is what lasts.
        tier = tier or str(settings.home / "sealed")
        budget = budget or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    trust = TrustStore(settings.home / "keys" / "trusted")
    keeper = Keeper(
        catalogue,
        store,
        Transport(catalogue, store, key, trust, settings.hot / "store" / "moving", secret),
        # One that is missing may be a disk that is not mounted: what is put in its place fills another.
        tier=open_tier(tier, make=not settings.tier) if tier else None,
        pack=settings.pack,
        pack_min=settings.lazy_min_mib << 20,
        budget=budget,
        worker_class=cls,
        read_through=settings.read_through,
    )
    catalogue.on_removed = keeper.collect_later
    return keeper


async def serve(settings: Settings) -> None:
    """Run until asked to stop."""
    heap.confine()
    descriptors.raise_limit()
    _prepare_home(settings)
    room = Room(settings.home)
    room.give_all()
    faults.configure(settings.faults)
    criu, settings = _check_host(settings)
    if keep_quick() is None:  # it lives as long as this process
        log.info("no performance counters here: each restore waits some 15 ms for the kernel to switch breakpoints on")
    run_id = uuid.uuid4().hex[:6]
    journal = Journal(settings.home, room)
    content = ContentStore(settings.home, settings.worker_uid)
    logs = LogBook(settings.home / "logs", settings.log_mib << 20)
    resources = Resources(settings, content)
    claim(settings.shm, settings.home)
    await asyncio.to_thread(sweep)
    settings.hot.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.encrypted:
        _check_private(settings.hot)
    key = SigningKey.load_or_create(settings.home / "keys" / "ed25519")
    store = await asyncio.to_thread(PageStore, settings.hot / "store", key=key.derive("page store seals"))
    layers = LayerFiles(settings.hot / "store" / "layers")
    catalogue = Catalogue(settings.hot / "snapshots", key, store, layers)
    facts = await asyncio.to_thread(host_facts, criu)
    cls = worker_class(facts)
    keeper = _keeper(settings, catalogue, store, key, cls.digest)
    if settings.cuda_dir and not (Path(settings.cuda_dir) / "libcuda.so.1").exists():
        raise SpecError(f"setting cuda_dir: no libcuda.so.1 in {settings.cuda_dir}", code="bad-setting")
    gpus = await find_gpus(settings.gpu, settings.cuda_dir, criu.path)
    controller = Controller(
        settings,
        journal=journal,
        logs=logs,
        resources=resources,
        catalogue=catalogue,
        run_id=run_id,
        gpus=tuple(Gpu(d.uuid, d.name) for d in gpus.devices),
        no_gpu=gpus.why,
    )
    factory = await SandboxFactory.open(settings)
    keeper.on_taken_up = controller.snapshot_arrived
    keeper.on_withdrawn = controller.retire
    keeper.wanted = controller.thaws
    controller.backend = LocalBackend(
        LocalConfig(
            spool=settings.home / "calls",
            page_server_uid=settings.worker_uid + 1,
            lazy_min_bytes=settings.lazy_min_mib << 20,
            drain_ms=settings.drain_ms,
            zygotes=ZygoteConfig(
                key=settings.home / "keys" / "zygotes",
                spool=settings.home / "calls",
                enabled=settings.zygotes,
                keep=settings.keep_zygotes,
                min_ms=settings.zygote_min_ms,
            ),
            huge_pages=settings.huge_pages,
            gpu_free_percent=settings.gpu_free_percent,
        ),
        observer=controller,
        factory=factory,
        catalogue=catalogue,
        content=content,
        criu=criu,
        worker_class=cls,
        keeper=keeper,
        gpus=gpus,
    )
    limit = settings.memory_mib * (1 << 20)
    controller.memory = watch = MemoryWatch(controller.state, controller.backend, controller.emit, logs, limit=limit)
    down = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, down.set)

    api = build(
        controller,
        content=content,
        catalogue=catalogue,
        worker_class=cls,
        gpu_classes=gpus.classes(cls),
        shutdown=down.set,
    )
    servers: list[tuple[_Server, socket.socket]] = []

    def server(app: Any, sock: socket.socket, http: type[Local]) -> None:
        config = uvicorn.Config(
            app, http=http, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=3
        )
        servers.append((_Server(config), sock))

    server(api, _unix_socket(settings), Local)
    tcp = _tcp_socket(settings)
    if tcp is not None:
        server(TokenAuth(api, settings.token, settings.metrics_token), tcp, Remote)

    room.take(_ROOM_LEFT)
    controller.recover()
    gc.collect()
    gc.freeze()  # what has been loaded stays: no collection has to go through it again while calls wait
    keeper.go_on_later()
    keeper.look_later()
    factory.start_filling()
    log.info(
        "woodfrogd %s ready: home %s, criu %s, class %s",
        woodfrog.__version__,
        settings.home,
        criu.path,
        cls.digest[:12],
    )
    running = [asyncio.ensure_future(s.serve(sockets=[sock])) for s, sock in servers]
    _tell_ready()
    watching = asyncio.ensure_future(watch.run())
    tidy = asyncio.ensure_future(_tidy(controller, room, settings.home / "daemon.log"))
    try:
        await asyncio.wait([asyncio.ensure_future(down.wait()), *running], return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping")
    finally:
        tidy.cancel()
        watching.cancel()
        await controller.shutdown()
        _expect_broken_off(servers)
        await asyncio.wait(running, timeout=5)
        settings.socket.unlink(missing_ok=True)
        logs.close()
        journal.close()
        # What hangs in a thread (a tier that does not answer) must not keep the daemon; the lock goes with the process.
        threading.Thread(target=_leave_in, args=(_LEAVE_S,), daemon=True).start()


def _expect_broken_off(servers: list[tuple[_Server, socket.socket]]) -> None:
    """End the servers. Who follows a log is cut off, and goes on with the next daemon: one line of it, no traceback of
    each."""

    def keep(record: logging.LogRecord) -> bool:
        if "timeout graceful shutdown" in record.msg:
            log.info("the rest is broken off (requests: %d)", sum(len(s.server_state.tasks) for s, _ in servers))
            return False
        return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))

    logging.getLogger("uvicorn.error").addFilter(keep)
    for s, _ in servers:
        s.should_exit = True


def _tell_ready() -> None:
    """Tell systemd, where that has started it (sd_notify): the sockets listen, and what connects is served."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.sendto(b"READY=1", f"\0{address[1:]}" if address.startswith("@") else address)


def _leave_in(seconds: float) -> None:
    time.sleep(seconds)
    logging.shutdown()
    os._exit(0)


async def _tidy(controller: Controller, room: Room, own_log: Path) -> None:
    while True:
        await asyncio.sleep(_TIDY_S)
        controller.tidy()
        with contextlib.suppress(OSError):  # each is tried again
            room.take()
        with contextlib.suppress(OSError):
            await room.look()
        with contextlib.suppress(OSError):
            rotate_own(own_log, _OWN_LOG)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `woodfrogd`."""
    parser = argparse.ArgumentParser(
        prog="woodfrogd", description="woodfrog's daemon; configured by WOODFROG_* variables."
    )
    parser.add_argument("--home", help="state directory (default: WOODFROG_HOME or /var/lib/woodfrog)")
    parser.add_argument("--version", action="version", version=woodfrog.__version__)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load(home=Path(options.home).absolute() if options.home else None)
        uvloop.run(serve(settings))
    except WoodfrogError as e:
        print(f"woodfrogd: {e.message}", file=sys.stderr)
        return 0 if e.code == "already-running" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
