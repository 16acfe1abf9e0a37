"""Modal's names of exceptions, for programs written for it: `except modal.exception.FunctionTimeoutError`.

Each name is the class that woodfrog raises in that case. Names for what cannot happen here are classes that are never
raised. woodfrog's own tree: `woodfrog.errors`.

Example:
    >>> import woodfrog as modal
    >>> def poll(call):
    ...     try:
    ...         return call.get(timeout=0)
    ...     except modal.exception.OutputExpiredError:
    ...         return "gone"
    ...     except TimeoutError:
    ...         return "not yet"
"""

from __future__ import annotations

from woodfrog.errors import (
    AuthError,
    DaemonError,
    ExecutionError,
    FunctionTimeoutError,
    NotFoundError,
    SerializationError,
    SpecError,
    TimedOut,
    WoodfrogError,
)
from woodfrog.errors import OutputExpired as OutputExpiredError

__all__ = [
    "AlreadyExistsError",
    "AsyncUsageWarning",
    "AuthError",
    "ClientClosed",
    "ConflictError",
    "ConnectionError",
    "DataLossError",
    "DeprecationError",
    "DeserializationError",
    "Error",
    "ExecTimeoutError",
    "ExecutionError",
    "FilesystemExecutionError",
    "FunctionTimeoutError",
    "ImageBuildError",
    "InputCancellation",
    "InteractiveTimeoutError",
    "InternalAPIWarning",
    "InternalError",
    "InternalFailure",
    "InvalidError",
    "LogsFetchError",
    "ModuleNotMountable",
    "MountUploadTimeoutError",
    "NotFoundError",
    "OutputExpiredError",
    "PendingDeprecationError",
    "PermissionDeniedError",
    "RemoteError",
    "RequestSizeError",
    "ResourceExhaustedError",
    "SandboxFilesystemDirectoryNotEmptyError",
    "SandboxFilesystemError",
    "SandboxFilesystemFileTooLargeError",
    "SandboxFilesystemIsADirectoryError",
    "SandboxFilesystemNotADirectoryError",
    "SandboxFilesystemNotFoundError",
    "SandboxFilesystemPathAlreadyExistsError",
    "SandboxFilesystemPermissionError",
    "SandboxTerminatedError",
    "SandboxTimeoutError",
    "SerializationError",
    "ServerWarning",
    "ServiceError",
    "SnapshotCreationError",
    "TimeoutError",
    "UnimplementedError",
    "VersionError",
    "VolumeUploadTimeoutError",
    "WorkspaceManagementError",
]

Error = WoodfrogError
InvalidError = SpecError
TimeoutError = TimedOut
ConnectionError = ServiceError = DaemonError
DeserializationError = SerializationError
RemoteError = ExecutionError
"""A call without an answer: its process crashed, did not start, or raised what cannot be read here."""
DeprecationError = DeprecationWarning
PendingDeprecationError = PendingDeprecationWarning
"""The category of the warnings about older names."""


# Never raised, from here on.


class AlreadyExistsError(Error): ...


class ConflictError(InvalidError): ...


class DataLossError(Error): ...


class InternalError(Error): ...


class InternalFailure(Error): ...


class LogsFetchError(Error): ...


class PermissionDeniedError(Error): ...


class RequestSizeError(Error): ...


class ResourceExhaustedError(Error): ...


class SnapshotCreationError(Error): ...


class UnimplementedError(Error): ...


class VersionError(Error): ...


class WorkspaceManagementError(Error): ...


class ClientClosed(Error): ...


class ImageBuildError(RemoteError): ...


class ExecTimeoutError(TimeoutError): ...


class InteractiveTimeoutError(TimeoutError): ...


class MountUploadTimeoutError(TimeoutError): ...


class SandboxTimeoutError(TimeoutError): ...


class VolumeUploadTimeoutError(TimeoutError): ...


class SandboxTerminatedError(Error): ...


class SandboxFilesystemError(Error): ...


class FilesystemExecutionError(Error): ...


class SandboxFilesystemDirectoryNotEmptyError(SandboxFilesystemError): ...


class SandboxFilesystemFileTooLargeError(SandboxFilesystemError): ...


class SandboxFilesystemIsADirectoryError(SandboxFilesystemError): ...


class SandboxFilesystemNotADirectoryError(SandboxFilesystemError): ...


class SandboxFilesystemNotFoundError(SandboxFilesystemError): ...


class SandboxFilesystemPathAlreadyExistsError(SandboxFilesystemError): ...


class SandboxFilesystemPermissionError(SandboxFilesystemError): ...


class ModuleNotMountable(Exception): ...


class InputCancellation(BaseException):
    """A container whose call is cancelled is killed, so that its code never sees this."""


class AsyncUsageWarning(UserWarning): ...


class InternalAPIWarning(UserWarning): ...


class ServerWarning(UserWarning): ...
