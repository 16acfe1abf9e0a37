"""Secrets from files: what python-dotenv reads, Modal's programs mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from woodfrog import Secret
from woodfrog.errors import SpecError


def values(folder: Path, text: str) -> dict[str, str]:
    (folder / ".env").write_text(text)
    return dict(Secret.from_dotenv(folder)._spec.values)


def test_a_hash_begins_a_comment_only_after_a_space(tmp_path: Path) -> None:
    text = "PASSWORD=abc#123 # said twice\nURL=http://host/#part\n# c\n"
    assert values(tmp_path, text) == {"PASSWORD": "abc#123", "URL": "http://host/#part"}


def test_names_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WF_OUTSIDE", "out")
    text = "A=1\nB=${A}-${WF_OUTSIDE}-${WF_NOWHERE:-none}\nC='${A}'\nD=$A\n"
    assert values(tmp_path, text) == {"A": "1", "B": "1-out-none", "C": "1", "D": "$A"}


def test_values_of_several_lines(tmp_path: Path) -> None:
    key = "-----BEGIN-----\nabc==\n-----END-----"
    assert values(tmp_path, f"KEY=\"{key}\"\nexport NEXT='é'\nEMPTY=\nBARE\n") == {
        "KEY": key,
        "NEXT": "é",
        "EMPTY": "",
        "BARE": "",
    }


def test_what_is_no_such_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"\.env:2: not a line of the form NAME=value"):
        values(tmp_path, "A=1\nB='never closed\n")
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(SpecError, match=r"\.env cannot be read"):
        Secret.from_dotenv(tmp_path)


def test_the_library_is_loaded_when_a_file_is_read() -> None:
    program = "import sys, woodfrog; woodfrog.Secret.from_dict({}); print('dotenv' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
