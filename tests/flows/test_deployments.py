"""prefect.yaml: what it deploys is there, takes its parameters, reports nothing home, and does nothing by itself."""

from __future__ import annotations

from typing import Any

import pytest

from ffprune.stages.environment import QUIET_REPORTS
from ffprune.stages.params import read_yaml
from tests.flows.modules import load
from tests.toy import REPO

DEPLOYMENTS = {row["name"]: row for row in read_yaml(REPO / "prefect.yaml")["deployments"]}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_fits_its_flow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, function = DEPLOYMENTS[name]["entrypoint"].partition(":")
    flow: Any = getattr(load(file, monkeypatch), function)
    given = DEPLOYMENTS[name]["parameters"]
    flow.validate_parameters(given)
    # A parameter without its line would not be explained on the page that edits it.
    described = flow_descriptions(flow)
    assert set(given) <= set(described)
    assert all(described.values())


def flow_descriptions(flow: Any) -> dict[str, str]:
    from prefect.utilities.callables import parameter_schema

    return {name: row.get("description", "") for name, row in parameter_schema(flow).properties.items()}


def test_both_pools_serve_both_flows() -> None:
    served = {(row["entrypoint"], row["work_pool"]["name"]) for row in DEPLOYMENTS.values()}
    flows = ("flows/pipeline.py:pipeline", "flows/sweep.py:sweep")
    assert served == {(flow, pool) for flow in flows for pool in ("cpu", "gpu")}


def test_no_schedule_is_active_and_one_run_at_a_time() -> None:
    schedules = [row for one in DEPLOYMENTS.values() for row in one.get("schedules", [])]
    assert schedules
    assert not any(row["active"] for row in schedules)
    assert all(row["concurrency_limit"]["limit"] == 1 for row in DEPLOYMENTS.values())


def test_workers_report_nothing_home() -> None:
    for row in DEPLOYMENTS.values():
        variables = row["work_pool"]["job_variables"]["env"]
        assert variables == {name: QUIET_REPORTS[name] for name in variables}
        assert {"DO_NOT_TRACK", "DVC_NO_ANALYTICS", "MLFLOW_DISABLE_TELEMETRY"} <= set(variables)
