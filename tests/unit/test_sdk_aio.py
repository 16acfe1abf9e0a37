"""What has an asynchronous form in Modal has one here."""

from __future__ import annotations

from typing import Any

import pytest

import woodfrog as modal

# Modal 1.6's methods with `.aio`, by class. `App.run` is a block: `async with app.run()`.
MODAL = {
    "App": ["lookup", "get_dashboard_url", "deploy", "set_tags", "get_tags", "stop", "stats", "info"],
    "Function": [
        *("update_autoscaler", "get_web_url", "remote", "remote_gen", "spawn", "get_current_stats", "stats", "map"),
        *("starmap", "for_each", "spawn_map", "experimental_spawn_map", "hydrate"),
    ],
    "FunctionCall": ["num_inputs", "get", "iter", "get_call_graph", "cancel", "from_id", "gather"],
    "Obj": ["update_autoscaler"],
    "Volume": [
        *("info", "commit", "reload", "iterdir", "listdir", "read_file", "read_file_into_fileobj", "remove_file"),
        *("copy_files", "batch_upload", "rename", "hydrate"),
    ],
    "Secret": ["info", "update", "hydrate"],
    "Image": ["from_id", "build", "publish", "hydrate"],
    "Cls": ["hydrate"],
}


def instances() -> dict[str, Any]:
    def f(x: int) -> int:
        return x

    app = modal.App("a")
    return {
        "App": app,
        "Function": app.function(serialized=True)(f),
        "FunctionCall": modal.FunctionCall.from_id("c1"),
        "Obj": modal.Cls.from_name("a", "C")(),
        "Cls": modal.Cls.from_name("a", "C"),
        "Volume": modal.Volume.from_name("v"),
        "Secret": modal.Secret.from_dict({}),
        "Image": modal.Image.debian_slim(),
    }


@pytest.mark.parametrize("kind", sorted(MODAL))
def test_every_asynchronous_method_has_its_form(kind: str) -> None:
    of_class, instance = getattr(modal, kind), instances()[kind]
    walked = []
    for name in MODAL[kind]:
        if hasattr(of_class, name):
            walked.append(name)
            assert callable(getattr(instance, name).aio), f"{kind}.{name} has no .aio"
    assert walked or kind in ("Obj", "Secret", "Image", "Cls")


async def test_forms_that_wait_for_nothing() -> None:
    volume = modal.Volume.from_name("v")
    assert volume.commit() is volume.reload() is None
    assert await volume.commit.aio() is await volume.reload.aio() is None
    assert (await modal.App.lookup.aio("shop")).name == modal.App.lookup("shop").name == "shop"
    assert type(modal.App.lookup("shop")) is modal.App
    assert (await modal.FunctionCall.from_id.aio("c1")).object_id == "c1"
    assert await modal.FunctionCall.gather.aio() == modal.FunctionCall.gather() == []
    with modal.Volume.ephemeral() as one:
        async with modal.Volume.ephemeral() as other:
            assert one.is_ephemeral and other.is_ephemeral and one.name != other.name


async def test_older_names_of_from_name() -> None:
    with pytest.warns(DeprecationWarning) as warned:
        assert modal.Function.lookup("a", "f").tag == (await modal.Function.lookup.aio("a", "f")).tag == "f"
        assert modal.Cls.lookup("a", "C").tag == (await modal.Cls.lookup.aio("a", "C")).tag == "C"
    assert {w.filename for w in warned} == {__file__}
