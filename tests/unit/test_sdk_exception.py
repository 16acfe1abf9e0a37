"""Modal's names of exceptions."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import pytest

import woodfrog as modal
from woodfrog import errors, exception
from woodfrog.sdk.client import error_from_answer


def test_every_name_is_there_and_in_the_tree() -> None:
    assert modal.exception is exception and modal.Error is exception.Error is errors.WoodfrogError
    for name in exception.__all__:
        kind = getattr(exception, name)
        outside = {"DeprecationError", "PendingDeprecationError", "InputCancellation", "ModuleNotMountable"}
        if name not in outside and not name.endswith("Warning"):
            assert issubclass(kind, exception.Error), name
    assert not issubclass(exception.InputCancellation, Exception)
    for name in ("FunctionTimeoutError", "OutputExpiredError", "VolumeUploadTimeoutError", "SandboxTimeoutError"):
        assert issubclass(getattr(exception, name), exception.TimeoutError)
    # "Not yet" is the builtin one: a program that asks again must not ask for ever for what is gone.
    assert not issubclass(exception.OutputExpiredError, TimeoutError)
    assert set(exception.__all__) == {n for n, v in vars(exception).items() if isinstance(v, type)} - {
        *("DaemonError", "SpecError", "TimedOut", "WoodfrogError")
    }


@pytest.mark.parametrize("name", ["RemoteError", "ImageBuildError", "InternalFailure", "FunctionTimeoutError"])
def test_they_can_be_raised_bare_and_pickled(name: str) -> None:
    kind = getattr(exception, name)
    for error in (kind(), kind("why")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and again.args == error.args


def test_what_was_pickled_is_read_where_the_names_were_not_imported() -> None:
    data = pickle.dumps(exception.VolumeUploadTimeoutError("slow"))
    program = f"import pickle; e = pickle.loads({data!r}); print(type(e).__module__, type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["woodfrog.exception", "VolumeUploadTimeoutError", "slow"]


def test_codes_stay_with_their_own_classes() -> None:
    class Mine(errors.SpecError): ...

    assert type(error_from_answer({"error": {"code": "spec", "message": "x"}}, "")) is errors.SpecError
    assert type(error_from_answer({"error": {"code": "error", "message": "x"}}, "")) is errors.WoodfrogError
    unauthorized = errors.AuthError("wrong or missing token").to_dict()
    assert isinstance(error_from_answer({"error": unauthorized}, ""), exception.AuthError)


def test_warnings_about_older_names_are_silenced_by_modals_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", modal.exception.DeprecationError)
        modal.Stub("a")
