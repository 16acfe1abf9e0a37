"""Imports for the container only: on a client they wait until something is asked of what they bind.

What `with image.imports():` imports is needed where the function runs. A client that deploys a program, or calls what
was deployed, need not wait seconds for torch and transformers first. Packages that are installed and that this process
has not imported are put off; the program's own modules, the standard library and what is missing are imported as ever.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any

from wrapt import LazyObjectProxy

__all__ = ["Deferred", "settle"]

_waiting: dict[int, _Proxy] = {}
"""By id: what one asks of a proxy, its hash too, one asks of what it stands for."""


def settle() -> None:
    """Import all that was put off, before code of the container runs here: it may ask for the very class, as in
    `except`. What fails says so when it is used."""
    for proxy in list(_waiting.values()):
        with suppress(Exception):
            proxy.__wrapped__  # noqa: B018


class _Proxy(LazyObjectProxy[Any]):
    """What an import binds. The first use of it imports, and puts the real thing in its place."""

    _self_module: str
    _self_attribute: str | None
    _self_parts: dict[str, _Proxy]
    """Submodules that were put off as well: those that `import a.b` promises of `a`."""

    def __getattr__(self, name: str) -> Any:
        parts = self._self_parts
        return parts[name] if name in parts else super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _load, (self._self_module, self._self_attribute)


class _Interface:
    """What a proxy offers before it is known what it stands for; then it offers what that does."""

    def __call__(self) -> None: ...

    def __iter__(self) -> None: ...


class _Names:
    """The module that `from module import name` asks for its names."""

    def __init__(self, block: Deferred, module: str) -> None:
        self._block, self._module = block, module

    def __getattr__(self, name: str) -> Any:
        return self._block.put_off(self._module, name)


class Deferred:
    """The block in which imports of one module's code wait.

    Args:
        namespace: the globals of that code.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._import = builtins.__import__
        self._modules: dict[str, _Proxy] = {}
        """By dotted name."""

    def __enter__(self) -> None:
        self._import = builtins.__import__
        builtins.__import__ = self._take

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        builtins.__import__ = self._import

    def _take(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if globals is not self._namespace or level or "*" in (fromlist or ()) or not _can_wait(name):
            return self._import(name, globals, locals, fromlist, level)
        if fromlist:
            return _Names(self, name)
        parent: _Proxy | None = None
        path = ""
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            if path not in self._modules:
                self._modules[path] = self.put_off(path, None)
            if parent is not None:
                parent._self_parts[part] = self._modules[path]
            parent = self._modules[path]
        return self._modules[name.partition(".")[0]]

    def put_off(self, module: str, attribute: str | None) -> _Proxy:
        def load() -> Any:
            _waiting.pop(id(proxy), None)
            found = _load(module, attribute)
            if attribute is None:
                for name in [n for n in self._modules if n.startswith(f"{module}.")]:
                    importlib.import_module(name)
                proxy._self_parts.clear()
            for key, value in list(self._namespace.items()):
                if value is proxy:
                    self._namespace[key] = found
            return found

        proxy = _Proxy(load, interface=_Interface)
        proxy._self_module, proxy._self_attribute, proxy._self_parts = module, attribute, {}
        _waiting[id(proxy)] = proxy
        return proxy


def _load(module: str, attribute: str | None) -> Any:
    found = importlib.import_module(module)
    if attribute is None:
        return found
    with suppress(AttributeError):
        return getattr(found, attribute)
    with suppress(ModuleNotFoundError):
        return importlib.import_module(f"{module}.{attribute}")
    raise ImportError(f"cannot import name {attribute!r} from {module!r}", name=module)


def _can_wait(module: str) -> bool:
    """Whether it belongs to a package that is installed, and that nobody here has imported."""
    top = module.partition(".")[0]
    if top in sys.modules:
        return False
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return any(f"{kind}-packages" in place for place in places for kind in ("site", "dist"))
