"""Classes: lifecycle hooks, methods, parameters, and the handles through which instances are called."""

from __future__ import annotations

import ast
import contextlib
import inspect
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    dataclass_transform,
    get_type_hints,
    overload,
)

from woodfrog.errors import SpecError
from woodfrog.sdk import absent, checks, source
from woodfrog.sdk.dual import ClassDual, Dual
from woodfrog.sdk.functions import NOT_YET, Deployed, Function, Owner, ask, method_spec, missing, note_version
from woodfrog.sdk.options import Built, Defaults, build_spec
from woodfrog.sdk.parameters import annotations_of, by_name, described, signature, signature_of
from woodfrog.spec import FunctionSpec, LeftOut, MethodSpec

__all__ = ["Cls", "Method", "Obj", "enter", "exit", "make_cls", "method", "parameter"]

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L")

_RESERVED = NOT_YET.keys() - {"autoscaler", "logs", "metrics", "stats", "web_url"}
"""Names of Modal's own, of which a handle makes no method of the user's. Modal's classes lack the rest."""
_TYPES: tuple[type, ...] = (str, int, bool, float, bytes)
_KNOWN_S = 1.0
"""How long what the daemon said of a class is believed: a deploy may change its defaults."""


def _place(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return f"{checks.short(code.co_filename)}:{code.co_firstlineno}" if code else checks.caller()


def _in_class(function: Any, decorator: str) -> None:
    """Check, as far as can be seen yet, that a decorated function stands in a class."""
    if isinstance(function, Method) or not inspect.isfunction(function):
        raise SpecError(f"@{decorator}() is for plain functions in a class, got {function!r} ({checks.caller()})")
    role = getattr(function, "__woodfrog_role__", None)
    if role is not None:
        raise SpecError(
            f"{function.__name__} has both @{role['kind']}() and @{decorator}(): let one method call another "
            f"({_place(function)})"
        )
    head, _, _ = function.__qualname__.rpartition(".")
    if not head or head.endswith("<locals>"):
        raise SpecError(
            f"@{decorator}() on {function.__name__}: it is for methods of a class that is decorated with @app.cls() "
            f"({_place(function)})",
            code="not-a-method",
        )


def enter(_called_without_parentheses: Any = None, *, snap: bool = False) -> Callable[[F], F]:
    """Marks a method that runs when a container starts.

    Args:
        snap: True runs it before the snapshot is taken, so that what it builds is frozen with the process; needs
            `enable_memory_snapshot=True`. False runs it in every container, after a thaw too.

    Example:
        >>> import woodfrog
        >>> class Model:
        ...     @woodfrog.enter(snap=True)
        ...     def load(self):
        ...         self.weights = [1, 2, 3]

    Raises:
        SpecError: not a method, or `snap` is not a bool.
    """
    if _called_without_parentheses is not None:
        raise SpecError(f"write @enter() or @enter(snap=True), with parentheses ({checks.caller()})")
    if not isinstance(snap, bool):
        raise SpecError(f"enter(snap=...): expected True or False, got {snap!r} ({checks.caller()})")

    def mark(function: F) -> F:
        _in_class(function, "enter")
        function.__woodfrog_role__ = {"kind": "enter", "snap": snap}  # type: ignore[attr-defined]
        return function

    return mark


def exit(_called_without_parentheses: Any = None) -> Callable[[F], F]:
    """Marks a method that runs when a container is about to end.

    Raises:
        SpecError: not a method.
    """
    if _called_without_parentheses is not None:
        raise SpecError(f"write @exit(), with parentheses ({checks.caller()})")

    def mark(function: F) -> F:
        _in_class(function, "exit")
        function.__woodfrog_role__ = {"kind": "exit"}  # type: ignore[attr-defined]
        return function

    return mark


class Method(Generic[P, R, L]):
    """What `method()` leaves in a class: of an instance, `obj.run(x)` and `obj.run.local(x)` are the plain call.

    To type checkers, which know the class where there is its handle, an instance has a `Function` there.
    """

    def __init__(self, raw_f: Callable[..., L], is_generator: bool | None) -> None:
        self.raw_f = raw_f
        self.is_generator = is_generator
        self.__doc__ = raw_f.__doc__
        self.__name__ = raw_f.__name__

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Method[P, R, L]: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Function[P, R, L]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return LocalMethod(self.raw_f.__get__(instance, owner), self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> L:
        return self.raw_f(*args, **kwargs)

    def spec(self, name: str) -> MethodSpec:
        found = method_spec(self.raw_f, name)
        return found if self.is_generator is None else MethodSpec(name, self.is_generator, found.is_async)


@dataclass(frozen=True)
class LocalMethod:
    """A method of an instance in this very process."""

    local: Callable[..., Any]
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.local(*args, **kwargs)

    def _no(self) -> Any:
        raise SpecError(
            f"{self.name}: `self` is an instance in this process: call self.{self.name}.local(); for a call in a "
            f"container use the class's handle on the client ({checks.caller()})",
            code="not-yet",
        )

    remote = remote_gen = map = starmap = for_each = spawn = property(_no)


class MethodDecorator(Protocol):
    """What `@method()` makes of a method, as `Decorator` of a function."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
    ) -> Method[P, R, Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Method[P, R, R]: ...


def method(
    _called_without_parentheses: Any = None, *, is_generator: bool | None = None, **options: Any
) -> MethodDecorator:
    """Marks a method that can be called in a container: `Model().run.remote(x)`.

    Raises:
        SpecError: not a method.
        TypeError: an unknown parameter.
    """
    if _called_without_parentheses is not None:
        raise SpecError(f"write @method(), with parentheses ({checks.caller()})")
    for key in options:
        raise TypeError(f"method() has no parameter {key!r}{checks.nearest(key, ['is_generator'])} ({checks.caller()})")

    def mark(function: Callable[Concatenate[Any, P], Any]) -> Method[P, Any, Any]:
        _in_class(function, "method")
        return Method(function, is_generator)

    return mark


class _Unset:
    def __repr__(self) -> str:
        return "required"

    def __reduce__(self) -> str:
        return "_UNSET"


_UNSET = _Unset()


class Parameter:
    """A class parameter; made by `parameter()`."""

    def __init__(self, default: Any, init: bool) -> None:
        self.default, self.init = default, init
        self.where = checks.caller()


def parameter(*, default: Any = _UNSET, init: bool = True) -> Any:
    """Declares a parameter of a class: an annotation of type str, int, bool, float or bytes with this as its value.

    Args:
        default: value where none is given; without it the parameter is required.
        init: False keeps it out of the constructor; it then has its default, or none until the code sets it.

    Example:
        >>> import woodfrog
        >>> class Model:
        ...     size: int = woodfrog.parameter(default=3)
    """
    return Parameter(default, init)


@dataclass(frozen=True)
class _Field:
    name: str
    type: type
    parameter: Parameter

    def text(self) -> str:
        default = self.parameter.default
        return self.type.__name__ + ("" if default is _UNSET else f" = {default!r}")

    @classmethod
    def from_text(cls, name: str, text: str) -> _Field:
        """Inverse of `text`."""
        kind, equals, default = text.partition(" = ")
        type_ = next((t for t in _TYPES if t.__name__ == kind), str)
        value: Any = _UNSET
        if equals:
            try:
                value = ast.literal_eval(default)
            except (ValueError, SyntaxError):  # such as `inf`
                value = type_(default)
        return cls(name, type_, Parameter(value, True))


def _fields(cls: type, where: str) -> dict[str, _Field]:
    """Parameters of a class and its bases, checked."""
    found: dict[str, _Field] = {}
    for klass in reversed(cls.__mro__):
        for name, value in list(vars(klass).items()):  # a cache of the annotations may come into it
            if not isinstance(value, Parameter):
                continue
            annotation = annotations_of(klass).get(name)
            if isinstance(annotation, str):
                try:
                    annotation = get_type_hints(klass).get(name)
                except Exception:
                    annotation = {t.__name__: t for t in _TYPES}.get(str(annotation))
            if annotation not in _TYPES:
                known = ", ".join(t.__name__ for t in _TYPES)
                raise SpecError(
                    f"{cls.__name__}.{name}: a parameter needs a type annotation, one of {known} ({value.where})"
                )
            if value.default is not _UNSET:
                value.default = _typed(annotation, value.default, f"{cls.__name__}.{name}: default", where)
            elif not value.init:
                continue
            found[name] = _Field(name, annotation, value)
    if found and "__init__" in vars(cls) and not hasattr(vars(cls)["__init__"], "__woodfrog_fields__"):
        raise SpecError(f"{cls.__name__} has both parameter() and an __init__ of its own: keep one ({where})")
    return found


def _typed(kind: type, value: Any, what: str, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SpecError(f"{what} must be of type {kind.__name__}, got {value!r} ({where})", code="bad-parameter")
    return value


def _give_init(cls: type, fields: Mapping[str, _Field]) -> None:
    """A constructor that takes the parameters by name, here and in containers."""

    def __init__(self: Any, **values: Any) -> None:
        for name, value in _checked(cls.__name__, fields, values).items():
            setattr(self, name, value)
        for field in fields.values():
            if field.name not in values and field.parameter.default is not _UNSET:
                setattr(self, field.name, field.parameter.default)

    __init__.__woodfrog_fields__ = True  # type: ignore[attr-defined]
    setattr(cls, "__init__", __init__)  # noqa: B010


def _checked(name: str, fields: Mapping[str, _Field], values: Mapping[str, Any]) -> dict[str, Any]:
    where = checks.caller()
    known = {f.name: f for f in fields.values() if f.parameter.init}
    for key in values:
        if key not in known:
            raise TypeError(f"{name} has no parameter {key!r}{checks.nearest(key, known)} ({where})")
    missing = [f.name for f in known.values() if f.parameter.default is _UNSET and f.name not in values]
    if missing:
        raise TypeError(f"{name} needs the parameter{'s' * (len(missing) > 1)} {', '.join(missing)} ({where})")
    return {k: _typed(known[k].type, v, f"{name}({k}=...)", where) for k, v in values.items()}


def _of_fields(
    tag: str, fields: Mapping[str, _Field], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Parameters as they travel: what equals its default is left out, so that both ways of saying the same share
    containers and snapshots."""
    if args:
        raise TypeError(
            f"{tag} takes its parameters by name, as in {tag}({next(iter(fields))}=...) ({checks.caller()})"
        )
    values = _checked(tag, fields, kwargs)
    return (), {k: v for k, v in values.items() if v != fields[k].parameter.default}


def _of_signature(
    tag: str, takes: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same for a class with a constructor of its own."""
    try:
        return by_name(takes, args, kwargs)
    except TypeError as e:
        names = ", ".join(takes.parameters) or "nothing"
        raise TypeError(f"{tag}: {e}; it takes {names} ({checks.caller()})") from None


def hooks(cls: type, kind: Literal["enter", "exit"], snap: bool = False) -> list[Callable[..., Any]]:
    """Lifecycle hooks, bases first, in order of definition; an overridden one keeps its place."""
    entries: dict[str, Any] = {}
    for klass in reversed(cls.__mro__):
        for name, entry in vars(klass).items():
            if name in entries or hasattr(entry, "__woodfrog_role__"):
                entries[name] = entry
    found = []
    for entry in entries.values():
        role = getattr(entry, "__woodfrog_role__", None) or {}
        if role.get("kind") == kind and bool(role.get("snap")) == snap:
            found.append(entry)
    return found


def _methods(cls: type) -> dict[str, Method[..., Any, Any]]:
    found: dict[str, Method[..., Any, Any]] = {}
    for klass in reversed(cls.__mro__):
        for name, entry in vars(klass).items():
            if isinstance(entry, Method):
                found[name] = entry
            elif name in found:
                del found[name]  # Overridden by something that is not marked.
    return found


class Cls:
    """A class whose instances live in containers. Made by `@app.cls()` or `from_name`; called, it gives an `Obj`.

    Example:
        >>> import woodfrog
        >>> Embedder = woodfrog.Cls.from_name("sentence-transformers", "Embedder")
        >>> Embedder().run.remote(["hello"])  # doctest: +SKIP
    """

    def __init__(
        self,
        owner: Owner,
        tag: str,
        *,
        user_cls: type | None = None,
        spec: FunctionSpec | None = None,
        where: str = "",
        include_source: bool = True,
        lacks: tuple[absent.Lack, ...] = (),
    ) -> None:
        self._owner, self._tag, self._user_cls, self.spec = owner, tag, user_cls, spec
        self._where, self._include_source = where, include_source
        self._lacks = lacks
        """Why the class is in no run and no deploy; none where it is."""
        self._asked = -_KNOWN_S
        self._described: dict[str, Any] = {}
        if user_cls is not None:
            self.__doc__ = user_cls.__doc__
            self.__name__, self.__qualname__ = user_cls.__name__, user_cls.__qualname__
            self.__module__ = user_cls.__module__

    @classmethod
    def from_name(
        cls,
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: Any = None,
    ) -> Cls:
        """The class `name` of a deployed app. Asks nothing of the daemon before the first call, or `hydrate()`.

        Raises:
            SpecError: not names.
        """
        del environment_name, client
        note_version(version, "Cls.from_name")
        return cls(Deployed(app_name), checks.name(name, "Cls.from_name"))

    @ClassDual
    @classmethod
    def lookup(cls, app_name: str, name: str, **options: Any) -> Cls:
        """An older name of `from_name`."""
        del options
        warnings.warn("Cls.lookup is now called Cls.from_name", DeprecationWarning, stacklevel=3)
        return cls.from_name(app_name, name)

    @property
    def tag(self) -> str:
        return self._tag

    @property
    def __woodfrog_wrapped__(self) -> type:
        return self._get_user_cls()

    def _get_user_cls(self) -> type:
        if self._user_cls is None:
            raise SpecError(
                f"{self._tag} was looked up by name: its code is not here, so it can only be called with .remote()"
            )
        return self._user_cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A handle of the instance with these constructor arguments; nothing runs yet.

        Raises:
            TypeError: arguments that the class does not take.
            SpecError: a parameter of the wrong type.
        """
        return Obj(self, args, kwargs)

    def _left_out(self) -> tuple[LeftOut, ...]:
        """What of it is in no run and no deploy, since woodfrog lacks what it asks for: itself, methods, or nothing."""
        if self._lacks:
            return (absent.left_out(self._tag, self._lacks),)
        methods = _methods(self._user_cls) if self._user_cls is not None else {}
        lacking = {name: absent.lacks_of(m.raw_f) for name, m in methods.items()}
        return tuple(absent.left_out(f"{self._tag}.{name}", lacks) for name, lacks in lacking.items() if lacks)

    def _describe(self) -> dict[str, Any]:
        """What the daemon knows of a class whose code is not here; nothing where there is none: the call tells."""
        if time.monotonic() - self._asked >= _KNOWN_S:
            from woodfrog.sdk.client import segment

            client, app = self._owner.reach(self._tag)
            functions = client.request("GET", f"/apps/{segment(app)}").json()["functions"]
            self._described = next((f for f in functions if f["tag"] == self._tag), {})
            self._asked = time.monotonic()
        return self._described

    def _hydrate(self, client: Any = None) -> Cls:
        if self._lacks:
            raise absent.error(self._left_out()[0])
        ask(self._owner, self._tag)
        return self

    @property
    def hydrate(self) -> Dual[..., Cls, Coroutine[Any, Any, Cls]]:
        """`hydrate()`: ask the daemon whether the class is there; gives this handle.

        Raises:
            NotFoundError: no such app or class.
            SpecError: the app neither runs nor is deployed.
        """
        from woodfrog.sdk.call import in_thread

        return Dual(self._hydrate, in_thread(self._hydrate))

    def __getattr__(self, name: str) -> Any:
        user_cls = self.__dict__.get("_user_cls")
        if name in _RESERVED and not hasattr(user_cls, name):
            raise missing(self._tag, name)
        if user_cls is not None and not name.startswith("__"):
            value = getattr(user_cls, name)
            if isinstance(value, Method):
                raise AttributeError(f"{self._tag}.{name} is a method of instances: write {self._tag}().{name}")
            return value
        raise AttributeError(f"{self.__dict__.get('_tag', 'Cls')} has no attribute {name!r}")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        # `class B(A)` with a decorated A inherits from the plain class.
        return (self._get_user_cls(),)

    def __reduce__(self) -> tuple[Any, ...]:
        name = getattr(self._owner, "app_name", None)
        if name is None:
            raise SpecError(f"the handle of {self._tag} cannot be pickled: its app has no name")
        serialized = self.spec is not None and self.spec.source.kind == "serialized"
        return _rebuild, (name, self._tag, self._user_cls if serialized else None)

    def __repr__(self) -> str:
        return f"<Cls {self._tag}>"


def _rebuild(app_name: str, tag: str, user_cls: type | None) -> Cls:
    return Cls(Deployed(app_name), tag, user_cls=user_cls)


class Obj:
    """Handle of an instance: `obj.run.remote(x)` runs in a container, `obj.run.local(x)` on an instance made here."""

    def __init__(self, cls: Cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._cls, self._args, self._kwargs = cls, args, kwargs
        self._instance: Any = None
        self._entered = False
        self._params: bytes | None = None
        self._sent = args, kwargs
        """What a container gets."""
        user_cls = cls._user_cls
        if user_cls is None:
            return
        self._fields = fields = _fields(user_cls, cls._where)
        if fields:
            self._sent = args, self._kwargs = _of_fields(cls.tag, fields, args, kwargs)
        else:
            with contextlib.suppress(ValueError):  # Some classes of C code tell no signature.
                self._sent = _of_signature(cls.tag, signature(user_cls), args, kwargs)

    def _hydration(self) -> Dual[..., Obj, Coroutine[Any, Any, Obj]]:
        from woodfrog.sdk.call import in_thread

        def hydrate(client: Any = None) -> Obj:
            self._cls._hydrate()
            return self

        return Dual(hydrate, in_thread(hydrate))

    def _pickled(self) -> bytes | None:
        args, kwargs = self._sent
        if not args and not kwargs:
            return None
        from woodfrog.sdk.payload import dumps_parameters

        tag = self._cls.tag
        if self._cls._user_cls is None:
            known = self._cls._describe()
            if known.get("parameters"):
                fields = {name: _Field.from_text(name, text) for name, text in known["parameters"].items()}
                args, kwargs = _of_fields(tag, fields, args, kwargs)
            elif known.get("constructor") is not None:
                args, kwargs = _of_signature(tag, signature_of(known["constructor"]), args, kwargs)
            return dumps_parameters(args, kwargs, f"{tag}(...)") if args or kwargs else None
        if self._params is None:
            self._params = dumps_parameters(args, kwargs, f"{tag}(...)")
        return self._params

    def _constructed(self) -> Any:
        """The instance in this process, made at first need. Its enter hooks may not have run."""
        if self._instance is None:
            checks.settle_imports()
            self._instance = self._cls._get_user_cls()(*self._args, **self._kwargs)
        return self._instance

    def _local(self) -> Any:
        """The instance in this process, with its enter hooks run."""
        instance = self._constructed()
        if not self._entered:
            user_cls = self._cls._get_user_cls()
            for hook in (*hooks(user_cls, "enter", True), *hooks(user_cls, "enter", False)):
                _settle(hook.__get__(instance)())
            self._entered = True
        return instance

    def _attribute(self, user_cls: type, name: str) -> Any:
        """What is no method: nothing of a container's start happens here for it."""
        field = self._fields.get(name)
        if field is not None and self._instance is None:
            return self._kwargs.get(name, field.parameter.default)
        # A constructor made of parameters sets nothing else: no need to make an instance to know.
        of_instance = not name.startswith("_") and (not self._fields or self._instance is not None)
        if hasattr(user_cls, name) or (of_instance and name in vars(self._constructed())):
            return getattr(self._constructed(), name)
        raise AttributeError(
            f"{self._cls.tag} has no method or attribute {name!r}{checks.nearest(name, _methods(user_cls))}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_cls" not in self.__dict__:
            raise AttributeError(name)
        cls = self._cls
        if cls._user_cls is None or not hasattr(cls._user_cls, name):
            if name == "hydrate":
                return self._hydration()
            if name in _RESERVED:
                raise missing(cls.tag, name)
        if cls._user_cls is None:
            if name.startswith("_"):
                raise AttributeError(name)
            return Function(cls._owner, f"{cls.tag}.{name}", params=self._pickled)
        known = _methods(cls._user_cls)
        if name not in known:
            return self._attribute(cls._user_cls, name)

        def local(*args: Any, **kwargs: Any) -> Any:
            return known[name].raw_f.__get__(self._local())(*args, **kwargs)

        local.__name__, local.__doc__ = name, known[name].__doc__
        handle: Function[..., Any, Any] = Function(
            cls._owner,
            f"{cls.tag}.{name}",
            raw=local,
            method=known[name].spec(name),
            params=self._pickled,
            lacks=cls._lacks or absent.lacks_of(known[name].raw_f),
        )
        return handle

    def __reduce__(self) -> tuple[Any, ...]:
        return Obj, (self._cls, self._args, self._kwargs)

    def __repr__(self) -> str:
        return f"<{self._cls.tag} object>"


def _settle(value: Any) -> None:
    if not isinstance(value, Awaitable):
        return
    import asyncio

    async def settle() -> None:
        await value

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(settle())
        return
    if inspect.iscoroutine(value):
        value.close()
    raise SpecError("an asynchronous enter hook cannot run in .local() inside a running event loop")


def _hook(kind: Literal["enter", "exit"], function: F) -> F:
    function.__woodfrog_role__ = {"kind": kind, "snap": False}  # type: ignore[attr-defined]
    return function


_OLD_HOOKS: dict[str, Any] = {
    "__enter__": _hook("enter", lambda self: self.__enter__()),
    "__aenter__": _hook("enter", lambda self: self.__aenter__()),
    "__exit__": _hook("exit", lambda self: self.__exit__(None, None, None)),
    "__aexit__": _hook("exit", lambda self: self.__aexit__(None, None, None)),
}


def _adopt_old_hooks(user_cls: type, where: str) -> None:
    """Programs older than `@enter` and `@exit` have the methods of a context manager in their place."""
    kinds: tuple[Literal["enter", "exit"], ...] = ("enter", "exit")
    for kind in kinds:
        names = [n for n, hook in _OLD_HOOKS.items() if hook.__woodfrog_role__["kind"] == kind and hasattr(user_cls, n)]
        # Beside hooks that are marked, they are the class's own affair.
        if not names or hooks(user_cls, kind) or hooks(user_cls, kind, True):
            continue
        for name in names:
            setattr(user_cls, f"_woodfrog{name}", _OLD_HOOKS[name])
        warnings.warn(
            f"{names[0]} runs at a container's {'start' if kind == 'enter' else 'end'}: "
            f"write @woodfrog.{kind}() ({where})",
            DeprecationWarning,
            stacklevel=4,
        )


@dataclass_transform(field_specifiers=(parameter,), kw_only_default=True)
def make_cls(owner: Owner, user_cls: Any, options: Mapping[str, Any], defaults: Defaults, where: str) -> Cls:
    """The handle for a decorated class.

    Raises:
        TypeError, SpecError: as `build_spec`, and a class that cannot be served.
    """
    if isinstance(user_cls, Cls):
        raise SpecError(f"{user_cls.tag} is decorated with @app.cls() twice ({where})")
    if not isinstance(user_cls, type):
        raise SpecError(f"@app.cls() is for classes, got {user_cls!r}: use @app.function() for a function ({where})")
    name = user_cls.__name__
    where = f"{name}, {where}"
    fields = _fields(user_cls, where)
    methods = _methods(user_cls)
    served = {n: m for n, m in methods.items() if not absent.lacks_of(m.raw_f)}
    if not methods:
        raise SpecError(f"{name} has no method to call: mark one with @woodfrog.method() ({where})", code="no-methods")
    _adopt_old_hooks(user_cls, where)
    built: Built = build_spec(
        "class",
        name=name,
        module=source.module_name(user_cls),
        qualname=user_cls.__qualname__,
        methods=tuple(m.spec(n) for n, m in served.items()),
        options=options,
        defaults=defaults,
        where=where,
        parameters={f.name: f.text() for f in fields.values() if f.parameter.init},
        constructor=None if fields else described(user_cls),
    )
    snapped = hooks(user_cls, "enter", True)
    if snapped and not built.spec.snapshot.enabled:
        raise SpecError(
            f"{name}.{snapped[0].__name__} is marked enter(snap=True), but {name} takes no snapshots: "
            f"use @app.cls(enable_memory_snapshot=True), or snap=False ({_place(snapped[0])})",
            code="snap-without-snapshot",
        )
    if fields:
        _give_init(user_cls, fields)
    inherited = {n: entry for klass in reversed(user_cls.__mro__) for n, entry in vars(klass).items()}
    lacks = (*built.lacks, *absent.lacks_of(user_cls), *(x for e in inherited.values() for x in absent.lacks_of(e)))
    if not served:
        lacks = (*lacks, *(lack for m in methods.values() for lack in absent.lacks_of(m.raw_f)))
    return Cls(
        owner,
        name,
        user_cls=user_cls,
        spec=built.spec,
        where=where,
        include_source=built.include_source,
        lacks=lacks,
    )
