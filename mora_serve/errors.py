"""The exception tree of mora-serve.

Foreign errors are mapped to these once, at the boundary where they appear. A message is one plain
sentence: ``<dotted.name> must <rule>, got <value>``, then the remedy. All of them survive pickling
across Ray, and none carries prompt text.
"""

from __future__ import annotations


class MoraError(Exception):
    """Root of every error that mora-serve raises on purpose."""


class ConfigError(MoraError):
    """The configuration cannot be used; starting must fail."""


class InvalidRequestError(MoraError):
    """A caller's input breaks a rule; maps to HTTP 400.

    ``param`` names the field (dotted path) and ``code`` is stable and machine-readable.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class NotFoundError(InvalidRequestError):
    """An id or model that does not exist; maps to HTTP 404."""


class ConflictError(InvalidRequestError):
    """The request contradicts stored state; maps to HTTP 409, never worth a retry."""


class OverloadedError(MoraError):
    """No capacity before any work was queued; maps to HTTP 429 with ``Retry-After``."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class ReplicaError(MoraError):
    """An engine could not answer although what it was asked is valid; retryable.

    ``lost``: the engine or its process ended *under* the call, which may be the reason why it
    ended. Such a call is repeated by those only who know what else was in it.
    """

    def __init__(self, message: str, lost: bool = False) -> None:
        super().__init__(message, lost)
        self.message = message
        self.lost = lost

    def __str__(self) -> str:
        return self.message


class GenerationError(ReplicaError):
    """A generator could not answer."""


class ScoringError(ReplicaError):
    """A scorer could not answer."""


class CalibrationError(MoraError):
    """A calibrator cannot be fitted, or does not belong to the scorer it is used with."""


class StorageError(MoraError):
    """Redis or blob storage failed or holds something unreadable; retryable."""


class BlobNotFoundError(StorageError):
    """A blob or registered file does not exist."""


class LeaseLostError(StorageError):
    """A fenced write came too late: another runner holds the shard now. Drop the work."""
