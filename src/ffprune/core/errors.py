"""Refusals that teach: what was asked, what is possible, what to change."""

from __future__ import annotations


class FfpruneError(Exception):
    """A refusal with three parts, printed as one message; the command line exits with status 2.

    Args:
        asked: what was asked for, with its value.
        possible: what is possible instead.
        change: what the user should change.
    """

    def __init__(self, asked: str, possible: str, change: str) -> None:
        self.asked, self.possible, self.change = asked, possible, change
        super().__init__(f"{asked.rstrip('.')}. {possible.rstrip('.')}. {change.rstrip('.')}.")

    def __reduce__(self) -> tuple[type[FfpruneError], tuple[str, str, str]]:
        """The three parts, so that a worker's refusal reaches the process that asked it."""
        return type(self), (self.asked, self.possible, self.change)


class ParameterError(FfpruneError):
    """A parameter is unknown, mistyped or out of range."""


class UnreachableSparsity(FfpruneError):
    """No allocation inside the bounds reaches the target sparsity."""


class MissingInput(FfpruneError):
    """A file or folder that a stage reads is not there."""


class ChecksumMismatch(FfpruneError):
    """Downloaded bytes are not the bytes that were asked for."""


class NoNetwork(FfpruneError):
    """A registry or hub could not be reached."""


class TooLittleText(FfpruneError):
    """A text has fewer tokens than the windows asked of it."""


class UnsupportedArchitecture(FfpruneError):
    """No row in the table of model families fits this model."""


class NonFiniteLoss(FfpruneError):
    """A loss that must be finite is not."""


class DiskFull(FfpruneError):
    """There is not enough room for an output."""


class WorkersLost(FfpruneError):
    """Workers that try policies ended again and again."""


class UnsafeFile(FfpruneError):
    """A file that could execute code when loaded (pickle, remote code) was refused."""
