"""Secrets: environment variables that reach a function without standing in its code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from woodfrog.errors import SpecError
from woodfrog.sdk.checks import environment, lacking
from woodfrog.spec import SecretSpec

__all__ = ["Secret"]


@lacking(
    {
        "get_dashboard_url": "look with `woodfrog secret list`",
        "hydrate": "it is looked up when a container starts; look with `woodfrog secret list`",
        "info": "look with `woodfrog secret list`",
        "lookup": "use Secret.from_name",
        "object_id": "a secret is known by its name",
        "objects": "use `woodfrog secret list`, `create` and `delete`",
        "update": "use `woodfrog secret create`",
    }
)
class Secret:
    """Environment variables for functions. Made by one of the `from_...` methods.

    Example:
        >>> import woodfrog
        >>> app = woodfrog.App("example", secrets=[woodfrog.Secret.from_dict({"TOKEN": "s3cret"})])
    """

    def __init__(self, spec: SecretSpec) -> None:
        self._spec = spec

    @classmethod
    def from_dict(cls, env_dict: Mapping[str, str | None] | None = None) -> Secret:
        """A secret with these values. Names with the value None are left out.

        Raises:
            SpecError: a name or value that cannot stand in an environment.
        """
        values = {k: v for k, v in (env_dict or {}).items() if v is not None}
        return cls(SecretSpec(values=environment(values, "Secret.from_dict")))

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        environment_name: str | None = None,
        required_keys: Iterable[str] = (),
        client: Any = None,
    ) -> Secret:
        """The secret that the daemon keeps under `name`; it is looked up when a container starts."""
        del environment_name, client
        if not isinstance(name, str) or not name:
            raise SpecError(f"Secret.from_name needs a name, got {name!r}")
        return cls(SecretSpec(name=name, required_keys=tuple(required_keys)))

    @classmethod
    def from_local_environ(cls, env_keys: Iterable[str]) -> Secret:
        """A secret with the values that these environment variables have now, on the client.

        Raises:
            SpecError: a variable that is not set.
        """
        from woodfrog.sdk.hooks import in_worker

        if in_worker():  # The values arrived with the container; the client's environment is not here.
            return cls(SecretSpec())
        keys = list(env_keys)
        missing = [k for k in keys if k not in os.environ]
        if missing:
            raise SpecError(f"Secret.from_local_environ: {', '.join(missing)} is not set in this environment")
        return cls(SecretSpec(values={k: os.environ[k] for k in keys}))

    @classmethod
    def from_dotenv(cls, path: str | Path | None = None, *, filename: str = ".env", client: Any = None) -> Secret:
        """A secret with the values of the nearest `.env` file at or above `path` (default: the working directory).

        The file is read by python-dotenv, as Modal's is: quotes, comments, values of several lines, `${NAME}`.

        Raises:
            SpecError: no such file, or a line that is not `NAME=value`.
        """
        from woodfrog.sdk.hooks import in_worker

        if in_worker():
            return cls(SecretSpec())
        start = Path(path) if path is not None else Path.cwd()
        start = start.resolve()
        if start.is_file():
            start = start.parent
        for folder in (start, *start.parents):
            if (folder / filename).is_file():
                return cls(SecretSpec(values=_parse_dotenv(folder / filename)))
        raise SpecError(f"Secret.from_dotenv: no {filename} in {start} or any directory above it")

    @property
    def name(self) -> str | None:
        """Of a secret that the daemon keeps."""
        return self._spec.name or None

    def __repr__(self) -> str:
        keys = sorted(self._spec.values)
        return (
            f"Secret.from_name({self._spec.name!r})"
            if self._spec.name
            else f"<Secret with {', '.join(keys) or 'no keys'}>"
        )


def _parse_dotenv(path: Path) -> dict[str, str]:
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8") as file:
            wrong = [line.original.line for line in parse_stream(file) if line.error]
    except (OSError, ValueError) as e:
        raise SpecError(f"Secret.from_dotenv: {path} cannot be read: {e}") from None
    if wrong:
        raise SpecError(f"{path}:{wrong[0]}: not a line of the form NAME=value")
    return {name: value or "" for name, value in dotenv_values(path).items()}
