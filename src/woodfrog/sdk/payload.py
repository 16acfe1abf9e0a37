"""Arguments, results and exceptions as bytes. A script's own classes travel by the name they have in a container."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
from functools import lru_cache
from types import FunctionType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from woodfrog.errors import ExecutionError, SerializationError
from woodfrog.sdk.parameters import PLAIN
from woodfrog.sdk.source import main_name

__all__ = [
    "RemoteTraceback",
    "dumps",
    "dumps_arguments",
    "dumps_by_value",
    "dumps_parameters",
    "loads",
    "remote_exception",
]


class RemoteTraceback(Exception):
    """The traceback of an exception that was raised in a container; stands as the cause of that exception here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


@lru_cache(maxsize=8)
def _top_level_names(file: str) -> frozenset[str]:
    """Names that importing `file` defines by `class` or `def`, whatever it is run as."""
    import ast

    try:
        with open(file, "rb") as f:
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))


def _resolve(module: str, qualname: str) -> Any:
    """Unpickles a reference to something of the script that was `__main__` where it was pickled."""
    found: Any = sys.modules["__main__"] if module == main_name() else importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return getattr(found, "__woodfrog_wrapped__", found)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles classes and functions of the running script as references: the container imports the same script."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType)) and obj.__module__ == "__main__":
            name, main = main_name(), sys.modules["__main__"]
            qualname = str(obj.__qualname__)
            top, *rest = qualname.split(".")
            if name and top in _top_level_names(str(getattr(main, "__file__", ""))):
                found = getattr(main, top, None)
                for part in rest:
                    found = getattr(found, part, None)
                if getattr(found, "__woodfrog_wrapped__", found) is obj:
                    return _resolve, (name, qualname)
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    """Finds what a container knows under the script's module name in the script running here."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == main_name():
            module_name = "__main__"
        return super().find_class(module_name, global_name)


def dumps(value: Any) -> bytes:
    """Pickle a value to be read in a container."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def loads(body: bytes | bytearray | io.BytesIO) -> Any:
    """Unpickle what came from a container. A BytesIO is read without copying it."""
    return _Unpickler(body if isinstance(body, io.BytesIO) else io.BytesIO(body)).load()


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> bytes:
    """The body of a call.

    Raises:
        SerializationError: names the argument that cannot be pickled.
    """
    try:
        return dumps((args, kwargs))
    except Exception as e:
        for name, value in [*enumerate(args, 1), *kwargs.items()]:
            try:
                dumps(value)
            except Exception as inner:
                raise SerializationError(
                    f"{what}: argument {name!r} of type {type(value).__name__} cannot be pickled: {_one_line(inner)}"
                ) from None
        raise SerializationError(f"{what}: the arguments cannot be pickled: {_one_line(e)}") from None


def dumps_parameters(args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> bytes:
    """Constructor arguments of a class: plain values always give the same bytes, so that they share snapshots.

    Raises:
        SerializationError: names the argument that cannot be pickled.
    """
    kwargs = dict(sorted(kwargs.items()))
    if not all(type(v) in PLAIN for v in (*args, *kwargs.values())):
        return dumps_arguments(args, kwargs, what)
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=5)
    pickler.fast = True  # Without the memo equal values give equal bytes, whether or not they are one object.
    pickler.dump((args, kwargs))
    return buffer.getvalue()


def dumps_by_value(obj: Any, what: str) -> bytes:
    """A function or class with all of its code, for `serialized=True`.

    Raises:
        SerializationError: something it refers to cannot be pickled.
    """
    module = sys.modules.get(obj.__module__)
    by_reference = module is not None and obj.__module__ != "__main__"
    try:
        if not by_reference:
            return bytes(cloudpickle.dumps(obj, protocol=5))
        known = obj.__module__ in cloudpickle.list_registry_pickle_by_value()
        cloudpickle.register_pickle_by_value(module)
        try:
            return bytes(cloudpickle.dumps(obj, protocol=5))
        finally:
            if not known:
                cloudpickle.unregister_pickle_by_value(module)
    except Exception as e:
        raise SerializationError(f"{what} cannot be pickled: {_one_line(e)}") from None


def load_result(body: bytes | io.BytesIO, what: str) -> Any:
    """The value a call returned.

    Raises:
        SerializationError: it cannot be unpickled here.
    """
    try:
        return loads(body)
    except Exception as e:
        raise SerializationError(
            f"the result of {what} cannot be unpickled here: {_one_line(e)}; "
            "the client needs the packages that define the result's types",
            modules=_modules(body),
        ) from e


def _modules(body: bytes | io.BytesIO) -> list[str]:
    from woodfrog import versions

    return versions.modules_of(body)


def remote_exception(body: bytes | io.BytesIO, what: str) -> BaseException:
    """The exception that a call raised, with its remote traceback as cause (or as a note, where it has a cause)."""
    try:
        data = loads(body)
    except Exception as e:
        return ExecutionError(
            f"{what} raised an exception that cannot be read here: {_one_line(e)}", code="remote-exception"
        )
    kind, message, text = str(data.get("type", "")), str(data.get("message", "")), str(data.get("traceback", ""))
    try:
        original = _exception(data.get("exception"))
    except Exception:
        original = None
    error: Exception
    # SystemExit or KeyboardInterrupt from over there must not end this process.
    if isinstance(original, Exception):
        error = original
    else:
        error = ExecutionError(f"{what} raised {kind}: {message}", code="remote-exception", type=kind, traceback=text)
    if text and error.__cause__ is None:
        error.__cause__ = RemoteTraceback(text)
    elif text:
        error.add_note(f"Remote traceback:\n{text}")
    return error


def _exception(value: Any) -> Any:
    """The exception, or the pickle of `(exception, [(its cause or context, "cause" | "context"), ...])`."""
    if not isinstance(value, bytes):
        return value
    error, links = loads(value)
    at = error
    for other, kind in links:
        if kind == "cause":
            at.__cause__ = other
        else:
            at.__context__ = other
        at = other
    return error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
