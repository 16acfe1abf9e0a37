"""The daemon as the command line sees it: the SDK's client, and the plain-JSON requests the commands make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from woodfrog.errors import NotFoundError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client


def connect(*, start: bool = True) -> Client:
    """The daemon's client; starts the daemon on this machine when none runs, unless `start` is False."""
    from woodfrog.sdk import client

    return client.connect(start=start)


def listing(client: Client, path: str, key: str) -> list[dict[str, Any]]:
    """A collection of the API: `{"apps": [...]}` or the bare list."""
    answer = client.json("GET", path)
    items = answer.get(key, []) if isinstance(answer, dict) else answer
    return [item for item in items if isinstance(item, dict)]


def split_target(client: Client, target: str) -> tuple[str, str]:
    """`APP.FUNC`, `APP.CLASS.METHOD` or `APP::FUNC` → app and tag. Only a name with several dots asks the daemon.

    Raises:
        NotFoundError: not of that form.
    """
    app, colons, tag = target.partition("::")
    if colons and app and tag:
        return app, tag
    parts = target.split(".")
    if len(parts) < 2 or not all(parts):
        raise NotFoundError(f"{target!r} names no function: write APP.FUNC or APP.CLASS.METHOD", code="bad-target")
    if len(parts) > 2:
        apps = {str(item.get("app")) for item in listing(client, "/v1/apps", "apps")}
        for cut in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:cut]) in apps:
                return ".".join(parts[:cut]), ".".join(parts[cut:])
    return parts[0], ".".join(parts[1:])
