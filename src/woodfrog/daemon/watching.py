"""Routes for who looks after many apps: what each has to do, its latest starts, and metrics for a scraper."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Query
from fastapi.responses import Response

import woodfrog
from woodfrog.control.state import Load
from woodfrog.daemon import metrics
from woodfrog.daemon.controller import Controller
from woodfrog.daemon.metrics import Family
from woodfrog.errors import NotFoundError
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.telemetry import counters

__all__ = ["STARTS", "add_routes", "load_row", "of_app"]

_STORE_EVERY_S = 60.0
"""What the store takes is found by looking at its files."""
STARTS = ("thawed", "woken", "zygote", "cold", "failed")
"""How starts are told apart: by kind, and those that came to nothing."""
_STATES = ("starting", "capturing", "parked", "idle", "running", "stopping")


def load_row(load: Load | None, now: float) -> dict[str, Any]:
    """Calls of a function, or of an app, for people."""
    load = load or Load()
    oldest = round(max(0.0, now - load.oldest), 1) if load.waiting else None
    return {"running": load.running, "waiting": load.waiting, "oldest_waiting_s": oldest}


def of_app(loads: dict[tuple[str, str], Load], app: str) -> Load:
    """Of all its functions together."""
    whole = Load()
    for (name, _), load in loads.items():
        if name == app:
            whole.add(load)
    return whole


def add_routes(api: FastAPI, controller: Controller, catalogue: Catalogue) -> None:
    begun = time.time()
    store: tuple[float, dict[str, Any]] = (0.0, {})

    @api.get("/v1/apps/{app}/starts")
    async def starts(app: str, limit: int = Query(20, ge=1, le=1000)) -> dict[str, Any]:
        """The latest starts of its containers, the newest first."""
        if not controller.journal.deploys(app):
            raise NotFoundError(f"no app {app!r} was ever deployed here", app=app)
        rows = [asdict(row) for row in controller.starts.latest(app, limit)]
        return {"starts": [{**row, "at": round(row["at"], 3)} for row in rows]}

    async def stored() -> dict[str, Any]:
        nonlocal store
        if time.monotonic() - store[0] > _STORE_EVERY_S or not store[1]:
            store = (time.monotonic(), await controller.backend.keeper.store_stats())
        return store[1]

    def gauges() -> list[Family]:
        loads: dict[tuple[str, ...], Load] = {(name,): Load() for name in map(controller.counted_as, controller.active)}
        for (app, _), load in controller.state.load_view().items():
            loads.setdefault((controller.counted_as(app),), Load()).add(load)
        now = controller.now()
        states = Counter({(state,): 0 for state in _STATES})
        containers = Counter({name: 0 for name in loads})
        for instance in controller.state.instances.values():
            states[instance.state,] += 1
            containers[controller.counted_as(instance.group.service.app),] += 1
        snapshots: Counter[tuple[str, ...]] = Counter({("function", "ready"): 0, ("zygote", "ready"): 0})
        memory: Counter[tuple[str, ...]] = Counter({("function",): 0, ("zygote",): 0})
        for manifest in catalogue.manifests():
            snapshots[manifest.kind, "retired" if catalogue.retired(manifest.id) else "ready"] += 1
            memory[manifest.kind,] += manifest.pages_bytes
        snapshots["function", "damaged"] = len(catalogue.damaged)
        gpus = Counter({(state,): 0 for state in ("free", "used", "set-aside")})
        for gpu in controller.backend.gpus():
            gpus[str(gpu["state"]),] += 1
        by_app = ("app",)
        oldest = {k: now - v.oldest if v.waiting else 0.0 for k, v in loads.items()}
        info = {(woodfrog.__version__,): 1}
        return [
            Family("info", "gauge", "Version of the daemon.", ("version",), info),
            Family("calls_running", "gauge", "Calls in containers.", by_app, {k: v.running for k, v in loads.items()}),
            Family("calls_waiting", "gauge", "Calls that wait.", by_app, {k: v.waiting for k, v in loads.items()}),
            Family("calls_oldest_waiting_seconds", "gauge", "Age of the oldest of them; 0 = none.", by_app, oldest),
            Family("containers", "gauge", "Of the whole machine.", ("state",), states),
            Family("app_containers", "gauge", "Of each app.", by_app, containers),
            Family("snapshots", "gauge", "Snapshots on this machine.", ("kind", "state"), snapshots),
            Family("snapshots_memory_bytes", "gauge", "Memory that they hold.", ("kind",), memory),
            Family("gpus", "gauge", "GPUs of this machine.", ("state",), gpus),
        ]

    def stores(found: dict[str, Any]) -> list[Family]:
        room = os.statvfs(controller.settings.home)
        parts = {
            ("pages",): found.get("stored_bytes", 0),
            ("rebuilt",): found.get("cache_bytes", 0),
            ("files",): found.get("large_files_bytes", 0),
        }
        budget, free = found.get("budget_bytes", 0), room.f_bavail * room.f_frsize
        return [
            Family("store_bytes", "gauge", "The store of snapshots' memory and files, on disk.", ("part",), parts),
            Family("store_budget_bytes", "gauge", "What snapshots may take; 0 = no limit.", (), {(): budget}),
            Family("disk_free_bytes", "gauge", "Free where the state directory is.", (), {(): free}),
            Family("results_bytes", "gauge", "Results that are kept.", (), {(): controller.journal.kept}),
        ]

    @api.get("/metrics")
    async def scrape() -> Response:
        """Prometheus's text format."""
        found = await stored()
        families = [
            *gauges(),
            *stores(found),
            *controller.metrics.families(counters, map(controller.counted_as, controller.active)),
        ]
        text = metrics.render([*families, *metrics.process_families(begun)])
        return Response(text, media_type=metrics.CONTENT_TYPE)
