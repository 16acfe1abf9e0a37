"""A snapshot's images in another form, while nobody restores it."""

from __future__ import annotations

from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import Manifest


def repack(catalogue: Catalogue, old: Manifest, new: Manifest) -> Manifest:
    ready = catalogue.ready_images(old, new)
    catalogue.swap_images(old, ready)
    catalogue.remove_replaced(ready.manifest)
    return ready.manifest
