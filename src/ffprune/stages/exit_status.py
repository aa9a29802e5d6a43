"""The exit status of a refusal. By it the flow knows what may go well when it is tried again, unchanged."""

from __future__ import annotations

from ffprune.core.errors import FfpruneError, NoNetwork, WorkersLost
from ffprune.stages.exclusive import RunInProgress
from ffprune.stages.tracking import TrackingBusy

REFUSED = 2
#: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
_TRANSIENT = (NoNetwork, RunInProgress, TrackingBusy, WorkersLost)


def status_of(error: FfpruneError) -> int:
    """2, or 75 for what is likely to pass: a network, a lock, lost workers."""
    return TRY_AGAIN if isinstance(error, _TRANSIENT) else REFUSED
