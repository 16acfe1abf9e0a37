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
    from woodfrog.sdk.hooks import is_local as is_local
    from woodfrog.sdk.hooks import register_after_restore as register_after_restore
    from woodfrog.sdk.hooks import register_before_snapshot as register_before_snapshot
    from woodfrog.sdk.hooks import restored as restored
    from woodfrog.sdk.hooks import shrink_before_snapshot as shrink_before_snapshot
    from woodfrog.sdk.hooks import snapshot_id as snapshot_id
    from woodfrog.sdk.image import Image as Image
    from woodfrog.sdk.options import Retries as Retries
    from woodfrog.sdk.secret import Secret as Secret
    from woodfrog.sdk.volume import Volume as Volume

    __version__: str

# Every name loads its module at first use: this package is imported by every worker and every user program.
_HOME = {
    "App": "app",
    "Cls": "cls",
    "Function": "functions",
    "FunctionCall": "call",
    "Image": "image",
    "Obj": "cls",
    "Retries": "options",
    "Secret": "secret",
    "Stub": "app",
    "Volume": "volume",
    "enable_output": "app",
    "enter": "cls",
    "exit": "cls",
    "is_local": "hooks",
    "method": "cls",
    "parameter": "cls",
    "register_after_restore": "hooks",
    "register_before_snapshot": "hooks",
    "restored": "hooks",
    "shrink_before_snapshot": "hooks",
    "snapshot_id": "hooks",
}

# fmt: off
_NOT_YET = frozenset((
    "Client", "CloudBucketMount", "ClusterInfo", "ContainerProcess", "Cron", "Dict", "Environment", "Error",
    "FilePatternMatcher", "Mount", "NetworkFileSystem", "Period", "Probe", "Proxy", "Queue", "Sandbox",
    "SandboxSnapshot", "SchedulerPlacement", "Server", "Tunnel", "Workspace", "asgi_app", "batched", "billing", "build",
    "clustered", "concurrent", "config", "current_function_call_id", "current_input_id", "exception", "experimental",
    "fastapi_endpoint", "forward", "get_cluster_info", "gpu", "interact", "io_streams", "web_endpoint", "web_server",
    "wsgi_app",
))
# fmt: on
"""Names that Modal has."""

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is not None:
        from importlib import import_module

        value = getattr(import_module("woodfrog.sdk." + home), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("woodfrog")
    elif name in _NOT_YET:
        raise AttributeError(f"Modal has {name!r}; woodfrog does not have it yet")
    else:
        raise AttributeError(f"module 'woodfrog' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
