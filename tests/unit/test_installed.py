"""What was installed into an environment after a snapshot."""

from __future__ import annotations

import os
from pathlib import Path

from woodfrog.daemon.installed import installed_since


def test_distributions_that_are_newer(tmp_path: Path) -> None:
    site, other = tmp_path / "site-packages", tmp_path / "other"
    for name, when in (("numpy-2.4.6", 100), ("torch-2.13.0+cpu", 300), ("scikit_learn-1.9.1", 200)):
        (site / f"{name}.dist-info").mkdir(parents=True)
        os.utime(site / f"{name}.dist-info", (when, when))
    (other / "late-1.dist-info").mkdir(parents=True)
    (site / "torch").mkdir()
    os.utime(other, (100, 100))
    path = [str(site), str(other), str(tmp_path / "python311.zip")]
    assert installed_since(path, 150.0) == ["scikit_learn 1.9.1", "torch 2.13.0+cpu"]
    assert installed_since(path, 300.0) == []
    os.utime(site, (100, 100))
    assert installed_since(path, 150.0) == [], "nothing was put there since"
