"""Prefect's temporary server ends with the flow that started it, however that ended.

A flow without a server starts one and stops it at exit; after `kill -9` it would stay for good. Prefect's servers
import the modules of the entry points ``prefect.collections`` when they start (pyproject.toml), and so this one.

A terminal's Ctrl-C reaches every process of its group at once. The server must not be in the flow's: it would be gone
before the flow can say to it how the run ended, which Prefect then tries for minutes.
"""

from __future__ import annotations

import os
from contextlib import suppress

from ffprune.stages.lifeline import follow_parent

if os.environ.get("PREFECT__SERVER_EPHEMERAL") == "1":
    with suppress(PermissionError):  # whoever leads a session has one already
        os.setsid()
    follow_parent()
