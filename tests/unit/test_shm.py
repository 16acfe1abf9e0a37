"""What daemons leave in /dev/shm."""

from __future__ import annotations

import os
from pathlib import Path

from woodfrog.daemon.shm import claim, sweep
from woodfrog.settings import Settings


def test_places_whose_state_directory_is_gone_are_removed(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("here", "gone", "forged", "open")]
    places = [tmp_path / Settings(home=home).shm.name for home in homes]
    for home, place in zip(homes, places, strict=True):
        claim(place, home)
        (place / "criu").mkdir()
    homes[0].mkdir()
    (places[2] / "home").write_text("/nowhere\n")  # not what its name says
    places[3].chmod(0o777)
    silent, other = tmp_path / "woodfrog-00000000", tmp_path / "woodfrog-test-1"
    silent.mkdir()  # of an earlier version, perhaps one that runs
    claim(other, homes[1])
    os.symlink(places[0], tmp_path / "woodfrog-11111111")
    assert sweep(tmp_path) == [places[1]]
    assert [p.exists() for p in (*places, silent, other)] == [True, False, True, True, True, True]


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    claim(tmp_path / "file", tmp_path)
