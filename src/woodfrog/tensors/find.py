"""The tensors that objects hold, by name, and the memory behind them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from woodfrog.errors import SpecError

__all__ = ["as_bytes", "named", "reachable", "storage_of"]

_LEAVES = (str, bytes, bytearray, int, float, complex, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def named(objects: Iterable[Any]) -> dict[str, torch.Tensor]:
    """Every tensor that `objects` hold, by the path that leads to it: "0.layer.weight", "1.state.0.exp_avg".

    Looks into modules, optimizers (their state), containers and objects' attributes, and at gradients; not into
    functions, classes or modules of Python. A tensor held twice has two names; an object seen twice is gone into once.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    alive: list[Any] = []  # what is made on the way keeps its id while others are compared with it
    stack = [(str(i), item) for i, item in reversed(list(enumerate(objects)))]
    while stack:
        path, item = stack.pop()
        if item is None or isinstance(item, _LEAVES):
            continue
        if isinstance(item, torch.Tensor):
            parts = _parts(item)
            if not parts:
                found[path] = item
            grad = item.grad if item.is_leaf else None
            if grad is not None:
                parts = [*parts, ("grad", grad)]
            stack += [(f"{path}.{name}", part) for name, part in reversed(parts)]
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        alive.append(item)
        stack += [(f"{path}.{name}", part) for name, part in reversed(list(_held(item)))]
    return found


def _parts(tensor: torch.Tensor) -> list[tuple[str, Any]]:
    """The tensors that a wrapper is made of; none for a plain one."""
    if tensor.layout is torch.sparse_coo:
        return [("indices", tensor._indices()), ("values", tensor._values())]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [] if flatten is None else [(name, getattr(tensor, name)) for name in flatten()[0]]


def _held(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, torch.nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from item.__dict__.get(kind, {}).items()
        yield from ((k, v) for k, v in vars(item).items() if k not in ("_parameters", "_buffers", "_modules"))
    elif isinstance(item, torch.optim.Optimizer):
        # Its state is keyed by parameters: their place in the groups is what stays the same.
        at = 0
        for group in item.param_groups:
            for parameter in group["params"]:
                yield f"params.{at}", parameter
                if parameter in item.state:
                    yield f"state.{at}", item.state[parameter]
                at += 1
        for i, group in enumerate(item.param_groups):
            yield f"groups.{i}", {k: v for k, v in group.items() if k != "params"}
    elif isinstance(item, Mapping):
        yield from ((str(k), v) for k, v in list(item.items()))
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from ((str(i), v) for i, v in enumerate(item))
    else:
        yield from list(getattr(item, "__dict__", {}).items())
        for klass in type(item).__mro__:
            slots = klass.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                    yield name, getattr(item, name)


def reachable() -> list[torch.Tensor]:
    """Every tensor that Python's garbage collector knows in this process. C++ holds others that it does not know."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def storage_of(name: str, tensor: torch.Tensor) -> torch.UntypedStorage:
    """The memory behind a tensor.

    Raises:
        SpecError: it has none of its own (code "no-storage"): another layout, a fake or a functional tensor.
    """
    try:
        if tensor.is_quantized or tensor.device.type == "meta":
            raise NotImplementedError("quantized" if tensor.is_quantized else "on the meta device")
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError) as e:
        kind = f"{type(tensor).__name__}, {tensor.layout}"
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise SpecError(f"tensor {name} ({kind}) has no memory of its own: {reason}", code="no-storage") from None
    return storage


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage's memory as one row of int8, without a copy."""
    return torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
