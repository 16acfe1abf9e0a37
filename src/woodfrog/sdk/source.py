"""Finds the program's code and packs it, so that a container imports the same modules as the client.

A module of a package is shipped with its top package; a plain module or script with the directory that holds it. With
them go the modules that the program imported from the working directory, those that an image names, and those that
`follow` finds.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from woodfrog.errors import SpecError
from woodfrog.spec import CODE, LocalFiles, RuntimeSpec

__all__ = [
    "IGNORE_FILE",
    "Archive",
    "Root",
    "import_program",
    "imported_roots",
    "main_name",
    "merge_roots",
    "named_roots",
    "pack",
    "root_of",
    "runtime",
]

IGNORE_FILE = ".woodfrogignore"
MAX_BYTES = 256 << 20
MAX_FILES = 20_000
_SCAN_FILES = 10 * MAX_FILES
"""Past the limit scanning goes on a while, to name what is large."""


@dataclass(frozen=True, order=True)
class Root:
    """What to ship: `directory`, or of it only `only` (a package's directory or a single file)."""

    directory: Path
    only: str | None = None


@dataclass(frozen=True)
class Archive:
    data: bytes
    """A plain tar."""
    digest: str
    """sha256 of `data`, in hex."""
    files: int


def main_name() -> str | None:
    """The name under which the module running as `__main__` is imported in a container; None if it has no file."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    if not file or not os.path.isfile(file):
        return None
    return Path(file).stem


def module_name(obj: object) -> str | None:
    """The importable name of the module that defines `obj`; None for a REPL, a notebook or `exec`."""
    name = getattr(obj, "__module__", None)
    if name == "__main__":
        return main_name()
    module = sys.modules.get(name or "")
    file = getattr(module, "__file__", None)
    return name if file and os.path.exists(file) else None


def loaded(name: str) -> ModuleType | None:
    """The module of that name in this process: `__main__` when it is the one shipped under `name`."""
    if name == main_name():
        return sys.modules["__main__"]
    return sys.modules.get(name)


_imported_from: set[Path] = set()
"""Working directories that `import_program` had on the import path."""


def import_program(target: str) -> ModuleType:
    """Import the program `target` (`path/app.py`, or a dotted module name) under its real module name.

    Raises:
        SpecError: no such file or module, a syntax error, or another module of the same name is already imported.
    """
    import importlib

    if target.endswith(".py") or os.sep in target:
        path = Path(target).resolve()
        if not path.is_file():
            raise SpecError(f"{target}: no such file", code="no-such-file")
        directory, parts = path.parent, [path.stem]
        while (directory / "__init__.py").is_file():
            parts.insert(0, directory.name)
            directory = directory.parent
        if parts[-1] == "__init__":
            parts.pop()
        if any("." in p for p in parts):
            raise SpecError(
                f"{target}: a file name with a '.' in its stem cannot be imported: rename it", code="bad-name"
            )
        name = ".".join(parts)
    else:
        path, directory, name = None, Path.cwd(), target
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    working = _working_directory()
    if working is not None:
        _imported_from.add(working)
        if str(working) not in sys.path:
            sys.path.insert(sys.path.index(str(directory)) + 1, str(working))
    try:
        module = importlib.import_module(name)
    except SyntaxError as e:
        raise SpecError(f"{e.filename or target}:{e.lineno}: syntax error: {e.msg}", code="syntax-error") from None
    except ModuleNotFoundError as e:
        if e.name and (name == e.name or name.startswith(e.name + ".")):
            raise SpecError(f"{target}: no such module", code="no-such-file") from None
        raise
    found = getattr(module, "__file__", None)
    if path is not None and (not found or Path(found).resolve() != path):
        raise SpecError(f"{target}: its module name {name!r} is taken by {found or 'a built-in module'}: rename it")
    return module


def root_of(name: str, file: str) -> Root:
    """Where the code of module `name` (at `file`) is to be taken from."""
    path = Path(file).resolve()
    parts = name.split(".")
    if path.name == "__init__.py":
        parts.append("__init__")
    if len(parts) > 1 and len(path.parents) >= len(parts):
        return Root(path.parents[len(parts) - 1], parts[0])
    if _shared(path.parent):
        return Root(path.parent, path.name)
    return Root(path.parent)


def merge_roots(roots: Iterable[Root]) -> dict[Root, Root]:
    """For every root the one to ship: a package beside the program's own files goes with all of them."""
    wanted = set(roots)
    whole = {r.directory for r in wanted if r.only is None}
    return {r: Root(r.directory) if r.directory in whole else r for r in wanted}


def _working_directory() -> Path | None:
    """None where it is a library's, or was removed."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    return None if installed(here) else here


def installed(path: Path) -> bool:
    """Whether it belongs to the Python environment, which containers see anyway."""
    return any(p in ("site-packages", "dist-packages") for p in path.parts) or path.is_relative_to(
        Path(os.__file__).parent
    )


def imported_roots() -> list[Root]:
    """What a program has imported from the working directory.

    Only where `import_program` or the user put that on the import path: what a test runner or a notebook has imported
    from there is not the program's.
    """
    here = _working_directory()
    named = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if here is None or (here not in _imported_from and str(here) not in named):
        return []
    ignored = ignore_rules(here / IGNORE_FILE)
    found = set()
    for name, module in list(sys.modules.items()):
        # Not by `getattr`, at which lazy modules import what they stand for.
        file = vars(module).get("__file__") if issubclass(type(module), ModuleType) else None
        if not isinstance(file, str) or not Path(file).is_relative_to(here):
            continue
        first = Path(file).relative_to(here).parts[0]
        same = first.partition(".")[0] == name.partition(".")[0]
        if same and not ignored(first, (here / first).is_dir()):
            found.add(Root(here, first))
    return sorted(found)


def named_roots(names: Iterable[str], where: str) -> list[Root]:
    """Where modules are that an image names; nothing for those of the Python environment.

    Args:
        where: words for the error: whose image it is.

    Raises:
        SpecError: there is no module of that name.
    """
    found: dict[Root, None] = {}
    for name in names:
        top = name.partition(".")[0]
        where_it_is = places(top)
        if where_it_is is None:
            raise SpecError(
                f"{where}: add_local_python_source({name!r}): there is no module {top!r} beside the program, in the "
                f"working directory {os.getcwd()}, or in the Python environment",
                code="no-such-module",
            )
        found.update((Root(p.parent, p.name), None) for p in where_it_is if not installed(p))
    return list(found)


def places(top: str, *, working_directory: bool = True) -> list[Path] | None:
    """The file or directories of a module of that name, which is not imported; None if there is none."""
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    try:
        spec = find_spec(top) or (PathFinder.find_spec(top, [os.getcwd()]) if working_directory else None)
    except (ImportError, ValueError):  # it is imported, and has no specification
        file = vars(sys.modules[top]).get("__file__") if top in sys.modules else None
        return [Path(file)] if file else None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return [Path(p) for p in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.has_location and spec.origin else []


def _shared(directory: Path) -> bool:
    """A directory that holds more than one program's files."""
    homes = {Path("/root"), Path("/home")}
    with contextlib.suppress(RuntimeError):
        homes.add(Path.home())
    return (
        directory in homes
        or directory in {Path(p) for p in ("/", "/tmp", "/var/tmp", "/dev/shm", "/opt", "/srv", "/mnt", "/usr", "/var")}
        or directory.parent == Path("/home")
        or directory.name in ("site-packages", "dist-packages")
        or directory == Path(os.__file__).parent
    )


def pack(roots: Sequence[Root], files: Sequence[LocalFiles] = ()) -> Archive:
    """A container's files as a tar that is the same byte for byte whenever they are: code in `app`, `files` elsewhere.

    Where several roots hold the same name the first counts, as on the import path; of `files` the last.

    Left out: hidden files, caches, editors' copies, virtual environments, node_modules, build artefacts, and what
    `.woodfrogignore` names (patterns as in .gitignore); of `files` what their own patterns name only.

    Raises:
        SpecError: too many or too large files, an unreadable one, or a symbolic link that leaves the directory.
    """
    import io
    import tarfile
    from hashlib import sha256

    code: dict[str, tuple[Path, str, Path]] = {}
    whole = next(iter(roots), Root(Path()))
    for root in roots:
        if root is whole or whole.only is not None or root.only not in code:
            for relative, kind in scan(root).items():
                code.setdefault(relative, (root.directory / relative, kind, root.directory))
    entries = {f"{CODE}/{relative}": entry for relative, entry in code.items()}
    for added in files:
        entries.update(_added(added))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(entries):
            path, kind, base = entries[name]
            info = tarfile.TarInfo(name)
            if kind == "link":
                info.type, info.mode, info.linkname = tarfile.SYMTYPE, 0o777, link_target(base, path)
                tar.addfile(info)
            elif kind == "dir":
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(info)
            else:
                try:
                    data = path.read_bytes()
                    executable = path.stat().st_mode & 0o111
                except OSError as e:
                    raise SpecError(
                        f"{path}: {e.strerror}: it is part of the program's code (see {IGNORE_FILE})"
                    ) from None
                info.size, info.mode = len(data), 0o755 if executable else 0o644
                tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    return Archive(data, sha256(data).hexdigest(), sum(1 for _, k, _ in entries.values() if k == "file"))


def _added(files: LocalFiles) -> dict[str, tuple[Path, str, Path]]:
    """What an image's `add_local_file` or `add_local_dir` adds: name in the tar to path, kind and top directory."""
    local = Path(files.local).expanduser().absolute()
    name = files.remote.lstrip("/")
    if local.is_file():
        return {name: (local, "file", local.parent)}
    if not local.is_dir():
        raise SpecError(f"Image.add_local_…: {files.local}: no such file or directory", code="no-such-file")
    found = scan(Root(local), _rules(files.ignore, f"ignore= of {files.local}"), everything=True)
    return {name: (local, "dir", local), **{f"{name}/{r}": (local / r, kind, local) for r, kind in found.items()}}


def link_target(base: Path, path: Path) -> str:
    base = base.resolve()
    target = Path(os.path.normpath(path.parent.resolve() / os.readlink(path)))
    if not target.is_relative_to(base) or not Path(os.path.realpath(target)).is_relative_to(base):
        raise SpecError(
            f"{path}: the symbolic link leads out of the program's directory, to {os.path.realpath(target)}: "
            f"replace it by what it points to, or name it in {base / IGNORE_FILE}",
            code="link-outside",
        )
    return os.path.relpath(target, path.parent.resolve())


def scan(root: Root, ignored: Callable[[str, bool], bool] | None = None, *, everything: bool = False) -> dict[str, str]:
    """Relative path to "file", "dir" or "link".

    Args:
        ignored: the rules; those of the directory's own file unless given.
        everything: hidden files, caches and so on, too.
    """
    ignored = ignored or ignore_rules(root.directory / IGNORE_FILE)
    found: dict[str, str] = {}
    sizes: Counter[str] = Counter()
    files = 0
    if root.only is not None and (root.directory / root.only).is_file():
        return {root.only: "file"}
    todo = [root.only or ""]
    while todo and files <= _SCAN_FILES:
        folder = todo.pop()
        if folder:
            found[folder] = "dir"
        try:
            children = sorted(os.scandir(root.directory / folder), key=lambda e: e.name)
        except OSError as e:
            raise SpecError(f"{root.directory / folder}: {e.strerror}: it is part of the program's code") from None
        for child in children:
            relative = f"{folder}/{child.name}" if folder else child.name
            is_dir = child.is_dir(follow_symlinks=False)
            if (not everything and _never(child, is_dir)) or ignored(relative, is_dir):
                continue
            if child.is_symlink():
                found[relative] = "link"
            elif is_dir:
                todo.append(relative)
            elif child.is_file(follow_symlinks=False):
                found[relative] = "file"
                files += 1
                depth = 2 if root.only else 1
                sizes["/".join(relative.split("/")[:depth])] += child.stat(follow_symlinks=False).st_size
    total = sum(sizes.values())
    if total > MAX_BYTES or files > MAX_FILES:
        largest = ", ".join(f"{name} ({size / (1 << 20):.1f} MiB)" for name, size in sizes.most_common(3))
        whose = "it" if everything else "the program's directory"
        remedy = (
            "leave some out with ignore=, or keep them in a Volume (`woodfrog volume put`)"
            if everything
            else f"name what is not code in {root.directory / IGNORE_FILE}, or move the program into one of its own"
        )
        raise SpecError(
            f"{root.directory}: {whose} holds {files}"
            f"{'+' if files > _SCAN_FILES else ''} files of {total / (1 << 20):.0f} MiB, over the limit of {MAX_FILES} "
            f"files or {MAX_BYTES >> 20} MiB; largest: {largest}; {remedy}",
            code="source-too-large",
        )
    return found


def _never(entry: os.DirEntry[str], is_dir: bool) -> bool:
    name = entry.name
    if name.startswith(".") or name.endswith((".pyc", ".pyo", ".egg-info")):
        return True
    if name.endswith("~") or name[:1] == name[-1:] == "#":  # an editor's copies
        return True
    if not is_dir:
        return False
    if name in ("__pycache__", "node_modules"):
        return True
    if name in ("build", "dist") and not os.path.exists(os.path.join(entry.path, "__init__.py")):
        return True
    return os.path.exists(os.path.join(entry.path, "pyvenv.cfg"))


def ignore_rules(path: Path) -> Callable[[str, bool], bool]:
    """The last matching pattern decides, `!` takes back; a directory left out takes all below with it."""
    try:
        return _rules(path.read_text().splitlines() if path.is_file() else (), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: {e}") from None


def _rules(lines: Iterable[str], where: str) -> Callable[[str, bool], bool]:
    rules: list[tuple[re.Pattern[str], bool, bool]] = []
    for line in lines:
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        negated = pattern.startswith("!")
        pattern = pattern.removeprefix("!")
        only_dirs = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        anchored = "/" in pattern
        body = _glob(pattern.lstrip("/"))
        try:
            rules.append((re.compile(body if anchored else rf"(?:.*/)?{body}"), negated, only_dirs))
        except re.error as e:
            raise SpecError(f"{where}: {line.strip()!r} is not a pattern: {e}") from None

    def ignored(relative: str, is_dir: bool) -> bool:
        verdict = False
        for pattern, negated, only_dirs in rules:
            if (is_dir or not only_dirs) and pattern.fullmatch(relative):
                verdict = not negated
        return verdict

    return ignored


def _glob(pattern: str) -> str:
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif (found := re.match(r"\[([!^]?)(\]?[^\]]*)\]", pattern[i:])) and found[2]:
            # Escape all but the dash of a range.
            inner = "".join(c if c == "-" else re.escape(c) for c in found[2])
            out, i = f"{out}[{'^' if found[1] else ''}{inner}]", i + found.end()
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return out


def runtime(roots: Iterable[Root], installed: Mapping[str, str]) -> RuntimeSpec:
    """The Python environment of this process, without the program's own directories on the import path.

    Args:
        installed: what `installed_packages` found.
    """
    own = {str(r.directory) for r in roots} | {"", os.getcwd(), os.path.dirname(os.path.abspath(sys.executable))}
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main and not getattr(sys.modules["__main__"], "__spec__", None):
        own.add(os.path.dirname(os.path.abspath(main)))
    # An environment's own directories stay, even when the program was started from within one of them.
    libraries = {
        p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") or p == str(Path(os.__file__).parent)
    }
    path = dict.fromkeys(
        os.path.abspath(p) for p in sys.path if p and (p in libraries or os.path.abspath(p) not in own)
    )
    return RuntimeSpec(
        executable=_by_one_name(_without_dots(sys.executable)),
        prefix=_without_dots(sys.prefix),
        base_prefix=_without_dots(sys.base_prefix),
        version=".".join(map(str, sys.version_info[:3])),
        sys_path=tuple(p for p in path if os.path.exists(p)),
        packages_digest=_packages_digest(installed),
    )


def _without_dots(path: str) -> str:
    """As it is unless a ".." is in it: of `../venv/bin/python`, the last part is what makes it that environment."""
    if ".." not in Path(path).parts:
        return path
    folder, name = os.path.split(path)
    return os.path.realpath(path) if name == ".." else os.path.join(os.path.realpath(folder), name)


def _by_one_name(executable: str) -> str:
    """`python3` where that is the same beside it: `python program.py` and `woodfrog deploy` share snapshots."""
    other = os.path.join(os.path.dirname(executable), "python3")
    with contextlib.suppress(OSError):
        if os.path.samefile(executable, other):
            return other
    return executable


def installed_packages() -> dict[str, str]:
    """Normalised name to version of every installed distribution; the first on the path counts, as in an import."""
    from importlib.metadata import distributions

    found: dict[str, str] = {}
    for d in distributions():
        # Not `d.metadata`, whose parser takes a second over all of a large environment.
        text = d.read_text("METADATA") or d.read_text("PKG-INFO") or d.read_text("") or ""
        fields = dict(_FIELD.findall(text.partition("\n\n")[0]))
        if name := fields.get("Name"):
            found.setdefault(normalise(name), fields.get("Version", ""))
    return found


_FIELD = re.compile(r"^(Name|Version):[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)


def normalise(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages_digest(installed: Mapping[str, str]) -> str:
    from hashlib import sha256

    text = "".join(f"{name}=={version}\n" for name, version in sorted(installed.items()))
    return sha256(text.encode()).hexdigest()
