"""Which GPUs a function gets: requests, what fits, what is free, what its snapshots depend on. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from woodfrog.spec import FunctionSpec

__all__ = ["Gpu", "chip_of", "chips", "chips_for", "choose", "fits", "parse", "possible"]


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine. `chip` is the driver's name of it."""

    id: str
    chip: str


def parse(request: str) -> tuple[str, int]:
    """A request as the SDK checked it: chip and count.

    >>> parse("A10G:2"), parse("any"), parse("H100!")
    (('A10G', 2), ('any', 1), ('H100', 1))
    """
    chip, _, count = request.partition(":")
    return chip.removesuffix("!"), int(count or 1)


def fits(wanted: str, chip: str) -> bool:
    """Whether a chip is what was asked for: every part of the wish is a word of the chip's name.

    >>> fits("A100-80GB", "NVIDIA A100-SXM4-80GB"), fits("A10", "NVIDIA A10G"), fits("T4", "Tesla T4")
    (True, False, True)
    """
    words = set(re.split(r"[^A-Z0-9.]+", chip.upper()))
    return wanted == "any" or set(re.split(r"[-_]", wanted.upper())) <= words


def chips(requests: Sequence[str], gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """The chips of this machine that fit one of the requests, the first request's first."""
    return tuple(dict.fromkeys(g.chip for r in requests for g in gpus if fits(parse(r)[0], g.chip)))


def choose(
    requests: Sequence[str], gpus: Sequence[Gpu], taken: Collection[str] = (), ready: Collection[str] = ()
) -> tuple[str, ...] | None:
    """GPUs for the first of the requests that free ones fulfil, all of one chip; None = there are not enough now.

    Args:
        ready: chips with a snapshot: where several fit one request, these come first.
    """
    for request in requests:
        count = parse(request)[1]
        for chip in sorted(chips((request,), gpus), key=lambda chip: chip not in ready):
            free = [g.id for g in gpus if g.chip == chip and g.id not in taken]
            if len(free) >= count:
                return tuple(free[:count])
    return None


def possible(requests: Sequence[str], gpus: Sequence[Gpu]) -> bool:
    """Whether this machine can ever fulfil one of the requests."""
    return choose(requests, gpus) is not None


def chips_for(spec: FunctionSpec, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """The chips that a function's snapshots may be of; `("",)`: they hold no GPU memory, and fit any."""
    return (chips(spec.resources.gpu, gpus) if spec.snapshot.gpu else ()) or ("",)


def chip_of(spec: FunctionSpec, held: Collection[str], gpus: Sequence[Gpu]) -> str:
    """Of those, the one for an instance that holds these GPUs."""
    return next((g.chip for g in gpus if spec.snapshot.gpu and g.id in held), "")
