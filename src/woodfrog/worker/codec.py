"""Arguments, results and exceptions to bytes and back. Results are kept as pieces: a large one is never copied."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from woodfrog.errors import SerializationError

__all__ = [
    "Body",
    "cloudpickle",
    "describe",
    "encode",
    "encode_error",
    "format_error",
    "load_arguments",
    "pickle_exception",
    "preload",
    "trim",
]

Body = Sequence[bytes | memoryview]

_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_SHOWN = 100_000
"""Characters of each part of an error in a header, which holds three of them whatever they are."""
_LINKS = 32
"""Causes and contexts of one exception that travel with it, at most."""


class _Pieces(list[bytes | memoryview]):
    """A file for the pickler that keeps what it is handed, so that large buffers are passed on uncopied."""

    def write(self, data: Any) -> int:
        piece = data if type(data) is bytes else _view(data)
        self.append(piece)
        return len(piece)


def _view(data: Any) -> memoryview:
    return data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data).cast("B")


def cloudpickle() -> Any:
    """The cloudpickle module, imported at first need."""
    return importlib.import_module("cloudpickle")


def load_arguments(data: bytearray, encoding: str, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call.

    Raises:
        SerializationError: the bytes are not what the encoding says.
    """
    if not data:
        return (), {}
    try:
        if encoding == "json":
            value = json.loads(data)
            if isinstance(value, list):
                return tuple(value), {}
            return ((), value) if isinstance(value, dict) else ((value,), {})
        args, kwargs = pickle.loads(data)
        return tuple(args), dict(kwargs)
    except Exception as e:
        raise SerializationError(
            f"the arguments of {what} cannot be read here: {describe(e)}; "
            "is the module that defines them part of the deployed code?",
            code="arguments",
            **_versions(data, encoding),
        ) from e


def _versions(data: bytearray, encoding: str) -> dict[str, Any]:
    """With what they were to be read, for a client that has others."""
    if encoding == "json":
        return {}
    try:
        versions = importlib.import_module("woodfrog.versions")
        return {"versions": versions.here(versions.modules_of(data))}
    except Exception:  # of packages with broken records; the error itself matters more
        return {}


def encode(value: Any, encoding: str, what: str) -> Body:
    """A result as the pieces of a message body.

    Raises:
        SerializationError: the value cannot be pickled (or is not JSON); names the function and the type at fault.
    """
    if encoding == "json":
        try:
            return [json.dumps(value, allow_nan=False).encode()]
        except (TypeError, ValueError, RecursionError) as e:
            raise SerializationError(
                f"{what} returned {_type_name(value)}, which is not JSON ({e}); return plain lists, dicts, text and "
                "numbers, or call it from the Python client",
                code="result",
            ) from None
    pieces = _Pieces()
    try:
        # Plain values cost no import of cloudpickle.
        pickler = pickle.Pickler if type(value) in _PLAIN else cloudpickle().CloudPickler
        pickler(pieces, protocol=5).dump(value)
    except Exception as e:
        kind = type(value).__name__
        hint = ""
        if kind in ("generator", "async_generator"):
            hint = "; call it with .remote_gen() to receive the items of a generator"
        raise SerializationError(
            f"{what} returned {_type_name(value)}, which cannot be pickled: {describe(e)}{hint}", code="result"
        ) from None
    return pieces


def _type_name(value: Any) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def describe(error: BaseException) -> str:
    """One line: type and message."""
    text = _message(error)
    return f"{_type_name(error)}: {text}" if text else _type_name(error)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as e:
        return f"<its message failed: {type(e).__name__}>"


def trim(error: BaseException) -> None:
    """Drop the frames of the worker, and of the import system under it, from the start of the tracebacks."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        tb: TracebackType | None = e.__traceback__
        while tb is not None and _ours(tb.tb_frame):
            tb = tb.tb_next
        e.__traceback__ = tb
        todo += (e.__cause__, e.__context__)


def _ours(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith((_HERE, "<frozen importlib", "<frozen runpy")) or name.endswith(
        ("/importlib/__init__.py", "/asyncio/base_events.py", "/asyncio/runners.py")
    )


def format_error(error: BaseException) -> dict[str, str]:
    """The plain form: type, message, traceback (trimmed of the worker's frames)."""
    import traceback

    trim(error)
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as e:
        text = f"{_type_name(error)}: <its traceback failed: {type(e).__name__}>\n"
    return {"type": _type_name(error), "message": _message(error), "traceback": text}


def encode_error(error: BaseException, encoding: str = "pickle") -> tuple[dict[str, str], Body]:
    """The plain form for the header, and the body: what a Python client raises, or the plain form as JSON."""
    plain = format_error(error)
    shown = {key: shorten(text) for key, text in plain.items()}
    if encoding == "json":
        return shown, [json.dumps(plain).encode()]
    return shown, [pickle.dumps({"exception": pickle_exception(error), **plain}, protocol=5)]


def shorten(text: str) -> str:
    """The beginning and the end of a long text: what is said of an error in a header, for logs and people."""
    left = len(text) - _SHOWN
    return text if left <= 0 else f"{text[: _SHOWN // 2]}\n... {left} characters left out ...\n{text[-_SHOWN // 2 :]}"


def pickle_exception(error: BaseException) -> bytes | None:
    """The exception with its chain of causes, or None when it does not survive pickling."""
    links: list[tuple[BaseException, str]] = []
    seen = {id(error)}
    at = error
    while len(links) < _LINKS:
        other, kind = (at.__cause__, "cause") if at.__cause__ is not None else (at.__context__, "context")
        if other is None or id(other) in seen or (kind == "context" and at.__suppress_context__):
            break
        seen.add(id(other))
        links.append((other, kind))
        at = other
    while True:
        for dumps in (_dumps, _dumps_without_init):
            try:
                data: bytes = dumps((error, links))
                # Many an exception pickles well and fails to unpickle, when its __init__ asks for more than its args.
                pickle.loads(data)
                return data
            except Exception:
                continue
        if not links:
            return None
        links = links[: len(links) // 2]


def _dumps(value: Any) -> bytes:
    return cloudpickle().dumps(value, protocol=5)  # type: ignore[no-any-return]


def _dumps_without_init(value: Any) -> bytes:
    """Exceptions that do not say how they are pickled are made without `__init__`, and get their attributes."""
    import copyreg
    import io

    base: Any = cloudpickle().CloudPickler

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            kind: Any = type(obj)
            plain = issubclass(kind, BaseException) and kind.__reduce__ is BaseException.__reduce__
            if plain and kind.__reduce_ex__ is object.__reduce_ex__:
                return getattr(copyreg, "__newobj__"), (kind, *obj.args), vars(obj) or None  # noqa: B009
            return super().reducer_override(obj)

    out = io.BytesIO()
    Pickler(out, protocol=5).dump(value)
    return out.getvalue()


def preload() -> None:
    """Import what the first call will need, so that a thawed process finds it in memory."""
    import traceback  # noqa: F401

    cloudpickle()
