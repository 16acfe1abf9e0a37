"""What daemons leave in /dev/shm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from woodfrog.daemon.shm import claim, sweep
from woodfrog.errors import HostError
from woodfrog.settings import Settings


def test_places_whose_state_directory_is_gone_are_removed(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("here", "gone", "forged", "open")]
    places = [tmp_path / Settings(home=home).shm.name for home in homes]
    for home, place in zip(homes, places, strict=True):
        os.close(claim(place, home))
        (place / "criu").mkdir()
    homes[0].mkdir()
    (places[2] / "home").write_text("/nowhere\n")  # not what its name says
    places[3].chmod(0o777)
    silent, other = tmp_path / "woodfrog-00000000", tmp_path / "woodfrog-test-1"
    silent.mkdir()  # of an earlier version, perhaps one that runs
    os.close(claim(other, homes[1]))
    os.symlink(places[0], tmp_path / "woodfrog-11111111")
    assert sweep(tmp_path) == [places[1]]
    assert [p.exists() for p in (*places, silent, other)] == [True, False, True, True, True, True]


def test_a_place_in_use_stays_where_its_state_directory_cannot_be_seen(tmp_path: Path) -> None:
    home = tmp_path / "in-a-container"
    place = tmp_path / Settings(home=home).shm.name
    held = claim(place, home)
    assert sweep(tmp_path) == []
    os.close(held)
    assert sweep(tmp_path) == [place]


@pytest.mark.parametrize("kind", ["open", "link", "foreign"])
def test_a_place_that_somebody_else_has_made(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is known beforehand, and what lies there is believed by root."""
    place, target = tmp_path / "woodfrog-11111111", tmp_path / "target"
    (target / "criu").mkdir(parents=True)
    target.chmod(0o777)
    place.symlink_to(target) if kind == "link" else target.rename(place)
    uid = os.geteuid()
    if kind == "foreign":
        place.chmod(0o755)
        if uid:
            pytest.skip("only root may give it away")
        os.chown(place, 12345, 12345)
    os.close(claim(place, tmp_path))
    assert not place.is_symlink() and os.listdir(place) == ["home"]
    info = place.stat()
    assert info.st_uid == uid and not info.st_mode & 0o022
    os.close(claim(place, tmp_path))
    assert len([p for p in tmp_path.iterdir() if p.name.startswith("woodfrog-11111111.")]) == 1
    if kind != "foreign":
        return
    os.chown(place, 12345, 12345)
    monkeypatch.setattr("os.rename", _refused)
    with pytest.raises(HostError, match="others may write there"):
        claim(place, tmp_path)


def _refused(*_: object) -> None:
    raise PermissionError


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert claim(tmp_path / "file/below", tmp_path) == -1
