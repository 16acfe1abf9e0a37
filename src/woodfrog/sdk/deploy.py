"""From decorated functions to a deployed app: the spec, the code and the blobs, and their way to the daemon."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from woodfrog.errors import DaemonError, SpecError
from woodfrog.sdk import checks, follow, nested, source
from woodfrog.sdk.client import Client, segment
from woodfrog.sdk.cls import Cls
from woodfrog.sdk.functions import NESTED, Function
from woodfrog.spec import AppSpec, FunctionSpec, ImageSpec, LocalFiles, to_dict

__all__ = ["Bundle", "build", "check_packages", "send"]

Handle = Function[..., Any, Any] | Cls

_UNRUN = frozenset(
    (
        *("apt_install", "cmd", "dockerfile_commands", "entrypoint", "from_dockerfile", "from_id"),
        *("micromamba_install", "pip_install_private_repos", "run_commands"),
        *("run_function", "shell"),
    )
)
"""Steps that would have changed the image."""


@dataclass(frozen=True)
class Bundle:
    """All that is sent for a deploy."""

    spec: AppSpec
    code: dict[str, bytes] = field(default_factory=dict)
    """Digest to tar."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Digest to pickled function or class."""


def build(name: str, handles: Sequence[Handle], program: tuple[str, str] | None = None) -> Bundle:
    """Check the app against this environment and pack its code, without what woodfrog lacks something for.

    Args:
        program: module name and file of the module that made the app.

    Raises:
        SpecError: a missing package, code that cannot be found again in a container, too much code.
        SerializationError: a serialized function that cannot be pickled.
    """
    left = tuple(item for h in handles for item in h._left_out())
    handles = [h for h in handles if not h._lacks]
    specs = [_spec(h) for h in handles]
    installed = source.installed_packages()
    for spec in specs:
        check_packages(spec.image, spec.tag, installed)
        _note_steps(spec)
    for handle in handles:
        _note_calls(handle)
    roots: dict[int, source.Root] = {}
    for i, (handle, spec) in enumerate(zip(handles, specs, strict=True)):
        if spec.source.kind == "module":
            root = _root(handle, spec)
            if handle._include_source:
                roots[i] = root
    wanted = list(roots.values())
    if program is not None and os.path.isfile(program[1]):
        wanted.append(source.root_of(*program))
    shipped = source.merge_roots(wanted)
    imported = source.imported_roots() if roots else []
    runtime = source.runtime(shipped.values(), installed)
    modules = [_module(specs[i]) for i in roots]
    imported += follow.followed_roots(modules, [*shipped.values(), *imported], runtime.sys_path)
    contents: dict[int, tuple[tuple[source.Root, ...], tuple[LocalFiles, ...]]] = {}
    for i, spec in enumerate(specs):
        own = [shipped[roots[i]], *imported] if i in roots else []
        parts = dict.fromkeys((*own, *source.named_roots(_local_modules(spec.image), f"the image of {spec.tag}")))
        if parts or spec.image.files:
            contents[i] = (tuple(parts), spec.image.files)
    archives = {content: source.pack(*content) for content in set(contents.values())}
    blobs: dict[str, bytes] = {}
    functions: list[FunctionSpec] = []
    for i, (handle, spec) in enumerate(zip(handles, specs, strict=True)):
        made = replace(spec.source, code_digest=archives[contents[i]].digest) if i in contents else spec.source
        if spec.source.kind == "serialized":
            from woodfrog.sdk.payload import dumps_by_value

            blob = dumps_by_value(_raw(handle), f"{spec.tag} (serialized=True)")
            digest = sha256(blob).hexdigest()
            blobs[digest] = blob
            made = replace(made, blob_digest=digest)
        functions.append(replace(spec, source=made))
    return Bundle(
        AppSpec(name=name, runtime=runtime, functions=tuple(functions), left_out=left),
        {a.digest: a.data for a in archives.values()},
        blobs,
    )


def send(
    client: Client,
    bundle: Bundle,
    *,
    ephemeral: bool,
    attended: bool = False,
    snapshot: bool = False,
    strategy: str = "rolling",
) -> dict[str, Any]:
    """Upload what the daemon lacks, then deploy; the daemon's answer.

    Args:
        attended: the client says once a minute that it is there; the app goes with it, whatever is under way.

    Raises:
        WoodfrogError: what the daemon answered.
    """
    for kind, contents in (("code", bundle.code), ("blobs", bundle.blobs)):
        for digest, data in contents.items():
            if not client.exists(f"/{kind}/{digest}"):
                client.request(
                    "PUT", f"/{kind}/{digest}", content=data, headers={"content-type": "application/octet-stream"}
                )
    from importlib.metadata import PackageNotFoundError, version

    try:
        own_version = version("woodfrog")
    except PackageNotFoundError:
        own_version = ""
    try:
        answer = client.request(
            "POST",
            f"/apps/{segment(bundle.spec.name)}/deploy",
            data={
                "spec": to_dict(bundle.spec),
                "ephemeral": ephemeral,
                "snapshot": snapshot,
                "strategy": strategy,
                "client": {
                    "pid": os.getpid(),
                    "uid": os.getuid(),
                    "version": own_version,
                    "program": sys.argv[0] if sys.argv else "",
                    "gpu": client.settings.gpu,
                    "attended": attended,
                },
            },
        ).json()
    except SpecError as e:
        if "unknown field" in e.message:
            e.message += ": the daemon is one of an older woodfrog: `woodfrog daemon restart`, and try again"
        raise
    if not isinstance(answer, dict):
        raise DaemonError(f"the daemon answered the deploy of {bundle.spec.name} with {answer!r}")
    return answer


def _spec(handle: Handle) -> FunctionSpec:
    if handle.spec is None:
        raise SpecError(f"{handle.tag} was looked up by name and cannot be deployed again from here")
    return handle.spec


def _raw(handle: Handle) -> Any:
    return handle._get_user_cls() if isinstance(handle, Cls) else handle.get_raw_f()


def _root(handle: Handle, spec: FunctionSpec) -> source.Root:
    """Where its code is; checks that importing the module and taking the name gives this very function or class."""
    module = source.loaded(spec.source.module)
    file = getattr(module, "__file__", None)
    if module is None or not file:
        raise SpecError(f"{spec.tag}: its module {spec.source.module!r} has no file any more ({handle._where})")
    found: Any = module
    for part in spec.source.qualname.split("."):
        found = vars(found).get(part) if isinstance(found, type) else getattr(found, part, None)
    if found is not handle and getattr(found, "__woodfrog_wrapped__", found) is not _raw(handle):
        now = "not there" if found is None else f"a {type(found).__name__} that is not it"
        raise SpecError(
            f"{spec.tag}: a container imports {spec.source.module}.{spec.source.qualname}, which is {now}: give it a "
            f"name of its own at the top level of its module, or use serialized=True ({handle._where})",
            code="not-importable",
        )
    return source.root_of(spec.source.module, file)


def _module(spec: FunctionSpec) -> tuple[str, Path]:
    file = getattr(source.loaded(spec.source.module), "__file__", None)
    assert file is not None  # `_root` has seen it
    return spec.source.module, Path(file).resolve()


_NAME = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:\[[^\]]*\])?\s*([^;]*?)\s*(?:;.*)?$")


def check_packages(image: ImageSpec, tag: str, installed: dict[str, str]) -> None:
    """Compare an image's packages with what is installed here, since functions run in this environment.

    Versions and markers count where `packaging` is installed; otherwise names do.

    Raises:
        SpecError: names every package that is missing or has another version, and the command that installs them.
    """
    wrong: list[str] = []
    wanted: list[str] = []
    for requirement in image.packages:
        trouble = _check(requirement, installed)
        if trouble:
            wrong.append(trouble)
            wanted.append(requirement)
    if wrong:
        quoted = " ".join(f"'{w}'" if re.search(r"[<>\s;\[!~]", w) else w for w in wanted)
        raise SpecError(
            f"the image of {tag} needs {', '.join(wrong)}; functions run in the environment that deploys: "
            f"{sys.executable} -m pip install {quoted}",
            code="missing-packages",
            packages=wanted,
        )


def _check(requirement: str, installed: dict[str, str]) -> str | None:
    """What is wrong, in words, or None."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        found = _NAME.match(requirement)
        if not found or "/" in found[2] or "@" in found[2]:
            _note_unchecked(requirement)
            return None
        return None if source.normalise(found[1]) in installed else f"{requirement}, which is not installed"
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        _note_unchecked(requirement)
        return None
    if parsed.marker is not None and not parsed.marker.evaluate():
        return None
    version = installed.get(source.normalise(parsed.name))
    if version is None:
        return f"{requirement}, which is not installed"
    if not parsed.specifier.contains(version, prereleases=True):
        return f"{requirement}, but {parsed.name} {version} is installed"
    return None


def _note_unchecked(requirement: str) -> None:
    checks.note(f"requirement:{requirement}", f"{requirement!r} is not a package of a known name and was not checked")


def _local_modules(image: ImageSpec) -> list[str]:
    """What `add_local_python_source` names."""
    steps = [s.split() for s in image.steps]
    return [name for step in steps if step[:1] == ["add_local_python_source"] for name in step[1:]]


def _note_calls(handle: Handle) -> None:
    """Of one function to another, which is refused in a container."""
    for who, call in nested.calls_of(handle):
        ways = [f"call {call.local} there"] * bool(call.local) + [
            f"run {who} on the client (.local())"
        ] * call.on_client
        text = f"{who} calls {call.text}(), which fails in a container: {NESTED}: {', or '.join(ways)} ({call.where})"
        checks.note(f"nested:{call.where}:{call.text}", text)


def _note_steps(spec: FunctionSpec) -> None:
    steps = [s for s in spec.image.steps if s.split(" ", 1)[0] in _UNRUN]
    if steps:
        checks.note(
            "steps:" + "|".join(steps),
            f"images are not built yet; recorded for {spec.tag} but not run: {'; '.join(s[:60] for s in steps)}",
        )
