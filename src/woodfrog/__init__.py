"""woodfrog freezes warmed-up Python functions and thaws copies of them in milliseconds.

The names are Modal's: `import woodfrog as modal` runs many a program written for it.

Example:
    >>> import woodfrog
    >>> app = woodfrog.App("example")
    >>> @app.function(enable_memory_snapshot=True, serialized=True)
    ... def square(x):
    ...     return x * x
    >>> square.local(3)
    9
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from woodfrog import exception as exception
    from woodfrog.errors import SpecError
    from woodfrog.exception import Error as Error
    from woodfrog.sdk.app import App as App
    from woodfrog.sdk.app import Stub as Stub
    from woodfrog.sdk.app import enable_output as enable_output
    from woodfrog.sdk.call import FunctionCall as FunctionCall
    from woodfrog.sdk.cls import Cls as Cls
    from woodfrog.sdk.cls import Obj as Obj
    from woodfrog.sdk.cls import enter as enter
    from woodfrog.sdk.cls import exit as exit
    from woodfrog.sdk.cls import method as method
    from woodfrog.sdk.cls import parameter as parameter
    from woodfrog.sdk.functions import Function as Function
    from woodfrog.sdk.hooks import current_function_call_id as current_function_call_id
    from woodfrog.sdk.hooks import current_input_id as current_input_id
    from woodfrog.sdk.hooks import is_local as is_local
    from woodfrog.sdk.hooks import register_after_restore as register_after_restore
    from woodfrog.sdk.hooks import register_before_snapshot as register_before_snapshot
    from woodfrog.sdk.hooks import restored as restored
    from woodfrog.sdk.hooks import shrink_before_snapshot as shrink_before_snapshot
    from woodfrog.sdk.hooks import snapshot_id as snapshot_id
    from woodfrog.sdk.image import Image as Image
    from woodfrog.sdk.options import Retries as Retries
    from woodfrog.sdk.patterns import FilePatternMatcher as FilePatternMatcher
    from woodfrog.sdk.secret import Secret as Secret
    from woodfrog.sdk.volume import Volume as Volume

    __version__: str

# Every name loads its module at first use: this package is imported by every worker and every user program.
_HOME = {
    "App": "sdk.app",
    "Cls": "sdk.cls",
    "Error": "exception",
    "FilePatternMatcher": "sdk.patterns",
    "Function": "sdk.functions",
    "FunctionCall": "sdk.call",
    "Image": "sdk.image",
    "Obj": "sdk.cls",
    "Retries": "sdk.options",
    "Secret": "sdk.secret",
    "Stub": "sdk.app",
    "Volume": "sdk.volume",
    "current_function_call_id": "sdk.hooks",
    "current_input_id": "sdk.hooks",
    "enable_output": "sdk.app",
    "enter": "sdk.cls",
    "exit": "sdk.cls",
    "is_local": "sdk.hooks",
    "method": "sdk.cls",
    "parameter": "sdk.cls",
    "register_after_restore": "sdk.hooks",
    "register_before_snapshot": "sdk.hooks",
    "restored": "sdk.hooks",
    "shrink_before_snapshot": "sdk.hooks",
    "snapshot_id": "sdk.hooks",
}

_SCHEDULE = "drop it, and have cron run `woodfrog call`"
_WEB = "call the function with .remote(), with `woodfrog call`, or over woodfrog's HTTP API"
_ENDPOINT = "without it the function can be called with .remote(), with `woodfrog call`, or over woodfrog's HTTP API"
_SERVE = "start the server on the host, and have it call functions with woodfrog.Function.from_name(…).remote()"
_SHARED = "keep shared data in a Volume, or in a service of your own"
_NO_SANDBOX = "run the program with subprocess inside a function"
_ONE_MACHINE = "drop it: there is one machine"
_DROP = "drop it"
_NOT_YET = {
    "Client": "drop it: the daemon is found by WOODFROG_HOST",
    "CloudBucketMount": "mount the bucket on the host, or read it with its own client",
    "Cluster": _ONE_MACHINE,
    "ClusterInfo": _ONE_MACHINE,
    "ContainerProcess": _NO_SANDBOX,
    "Cron": _SCHEDULE,
    "Dict": _SHARED,
    "Environment": "drop it: apps have names only",
    "Mount": "files beside the program are sent with it",
    "NetworkFileSystem": "use a Volume",
    "Period": _SCHEDULE,
    "Probe": _NO_SANDBOX,
    "Proxy": "drop it: containers reach the network through the host",
    "Queue": _SHARED,
    "Sandbox": _NO_SANDBOX,
    "SandboxSnapshot": _NO_SANDBOX,
    "SchedulerPlacement": _ONE_MACHINE,
    "Server": _SERVE,
    "Tunnel": _WEB,
    "Workspace": _ONE_MACHINE,
    "asgi_app": _SERVE,
    "batched": "without it, take a list of inputs in one call",
    "billing": "drop it: nothing is billed",
    "build": "install what it installs on the host, or do its work in @enter(snap=True)",
    "clustered": _ONE_MACHINE,
    "concurrent": "drop it, and say how many with max_containers=: a container takes one input at a time, and more "
    "containers are started",
    "config": "settings are environment variables: docs/settings.md",
    "fastapi_endpoint": _ENDPOINT,
    "forward": _WEB,
    "get_cluster_info": _ONE_MACHINE,
    "gpu": 'name GPUs by text, as in gpu="A100:2"',
    "interact": "use `woodfrog container exec`",
    "io_streams": _NO_SANDBOX,
    "sessioned": _WEB,
    "types": "drop it",
    "web_endpoint": _ENDPOINT,
    "web_server": _SERVE,
    "wsgi_app": _SERVE,
}
"""Names that Modal has, and what to do without them."""

_MODULES = {
    "app": ("app",),
    "cloud_bucket_mount": (),
    "cls": ("cls",),
    "experimental": (),
    "file_pattern_matcher": ("patterns",),
    "functions": ("functions", "call"),
    "image": ("image",),
    "mount": (),
    "network_file_system": (),
    "output": ("app",),
    "partial_function": ("cls",),
    "proxy": (),
    "retries": ("options",),
    "schedule": (),
    "scheduler_placement": (),
    "secret": ("secret",),
    "volume": ("volume", "volume_files"),
}
"""Where in `sdk` the names of Modal's modules are, for `from woodfrog.functions import FunctionCall`."""
_MODULES_NOT_YET = {
    "call_graph": "the client has the calls it made: their FunctionCall",
    "client": _NOT_YET["Client"],
    "cluster": _ONE_MACHINE,
    "container_process": _NO_SANDBOX,
    "dict": _SHARED,
    "environments": _NOT_YET["Environment"],
    "file_io": _NO_SANDBOX,
    "object": "drop it",
    "parallel_map": "use .map()",
    "queue": _SHARED,
    "runner": "use app.run() and app.deploy()",
    "running_app": "use app.run()",
    "sandbox": _NO_SANDBOX,
    "server": _SERVE,
    "serving": "use `woodfrog run`",
    "snapshot": _NO_SANDBOX,
    "stream_type": _NO_SANDBOX,
    "token_flow": _NOT_YET["Client"],
    "workspace": _ONE_MACHINE,
}

__all__ = list(_HOME)


class _Modules:
    """Finds the modules that Modal has and woodfrog has no file for."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        package, _, module = name.partition(".")
        if package != __name__ or module not in (*_MODULES, *_MODULES_NOT_YET, *_NOT_YET):
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, cls())  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        short = module.__name__.partition(".")[2]
        if short not in _MODULES:
            raise _not_yet(short, True)
        from importlib import import_module

        homes = [import_module(f"woodfrog.sdk.{home}") for home in _MODULES[short]]

        def find(name: str) -> Any:
            for home in homes:
                if name in home.__all__:
                    return getattr(home, name)
            if name in _NOT_YET:
                return _missing(name, True)
            if short == "experimental" and not name.startswith("__"):
                # A program that imports it, or has it in one function, runs otherwise.
                return _missing(f"experimental.{name}", _from_import())
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find


def _find_modules() -> None:
    import sys

    sys.meta_path.append(_Modules)


_find_modules()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is not None:
        from importlib import import_module

        value = getattr(import_module("woodfrog." + home), name)
    elif name == "exception":
        import woodfrog.exception as value
    elif name == "experimental":
        from importlib import import_module

        value = import_module("woodfrog.experimental")
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("woodfrog")
        except PackageNotFoundError:  # sources that PYTHONPATH names, not installed
            value = "unknown"
    elif name in _NOT_YET:
        return _missing(name, _from_import())
    else:
        raise AttributeError(f"module 'woodfrog' has no attribute {name!r}")
    globals()[name] = value
    return value


def _from_import() -> bool:
    """Whether who asks the caller of this for a name is a `from` import."""
    import sys
    from opcode import opname

    frame = sys._getframe(2)
    code = frame.f_code
    return code.co_name == "_handle_fromlist" or opname[code.co_code[frame.f_lasti]] == "IMPORT_FROM"


def _missing(name: str, importing: bool) -> Any:
    """What stands for one of Modal's names that are given to one function, so that the others run.

    Raises:
        SpecError: it is another one.
    """
    from importlib import import_module

    absent = import_module("woodfrog.sdk.absent")
    if name not in (*absent.DECORATORS, *absent.VALUES):
        raise _not_yet(name, importing)
    return absent.stand_in(name, _NOT_YET.get(name, _DROP))


def _not_yet(name: str, importing: bool) -> SpecError:
    """The error for one of Modal's names, with a remedy.

    In a `from` import Python would replace an AttributeError by its own "cannot import name". Elsewhere it is one, so
    that `hasattr` goes on saying no.
    """
    from importlib import import_module

    from woodfrog.errors import MissingNameError, SpecError

    where = import_module("woodfrog.sdk.checks").caller()
    kind = SpecError if importing else MissingNameError
    remedy = _NOT_YET.get(name) or _MODULES_NOT_YET.get(name, _DROP)
    return kind(f"Modal has {name!r}; woodfrog does not have it yet: {remedy} ({where})", code="not-yet", name=name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
