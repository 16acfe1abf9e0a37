"""Memory of PyTorch tensors: what changed in it, and moving it off its devices for a snapshot.

Needs torch, and is loaded only by who imports it. Works on any device that torch has; docs/gpu.md says what was run
where.

Example:
    >>> from woodfrog.tensors import TensorTracker, restore
    >>> tracker = TensorTracker(model, optimizer)
    >>> chain = [tracker.capture()]           # everything
    >>> step()
    >>> chain.append(tracker.capture())       # only the blocks that changed
    >>> restore(chain, into=(model, optimizer))
"""

from __future__ import annotations

from woodfrog.tensors.away import Away, put_away_on_snapshot
from woodfrog.tensors.delta import Delta, restore
from woodfrog.tensors.merkle import Tree
from woodfrog.tensors.track import State, TensorTracker

__all__ = ["Away", "Delta", "State", "TensorTracker", "Tree", "put_away_on_snapshot", "restore"]
