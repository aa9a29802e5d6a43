"""Prefect's temporary server ends with the flow that started it, however that ended.

A flow without a server starts one and stops it at exit; after `kill -9` it would stay for good. Prefect's servers
import the modules of the entry points ``prefect.collections`` when they start (pyproject.toml), and so this one.
"""

from __future__ import annotations

import os

from ffprune.stages.lifeline import follow_parent

if os.environ.get("PREFECT__SERVER_EPHEMERAL") == "1":
    follow_parent()
