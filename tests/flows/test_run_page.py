"""Where the links on Prefect's page of a run lead."""

from __future__ import annotations

import pytest

from tests.flows.modules import load


@pytest.mark.parametrize(
    ("store", "page"),
    [
        ("http://mlflow.team.example:5000", "http://mlflow.team.example:5000"),
        ("https://ada:secret@mlflow.team.example/runs/", "https://mlflow.team.example/runs"),
        ("sqlite:////project/mlruns/mlflow.db", "http://127.0.0.1:5005"),
        ("postgresql://ada:secret@host/ffprune", "http://127.0.0.1:5005"),
    ],
)
def test_links_lead_to_the_server_that_keeps_the_runs(store: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("flows/run_page.py", monkeypatch)
    # As `make` sets it, whatever the store is.
    monkeypatch.setenv("FFPRUNE_MLFLOW_URL", "http://127.0.0.1:5005")
    links: dict[str, str] = {}
    tables: list[str] = []
    monkeypatch.setattr(module, "create_link_artifact", lambda link, key, **about: links.update({key: link}))
    monkeypatch.setattr(module, "create_table_artifact", lambda rows, key, about: tables.append(about))
    module.show_outcomes([{"stage": "report", "outcome": "ran", "run_id": "made"}], store, "3", "parent")
    assert links == {
        "mlflow-run": f"{page}/#/experiments/3/runs/parent",
        "report": f"{page}/#/experiments/3/runs/made/artifacts/report.html",
    }
    assert "secret" not in tables[0]


def test_without_a_server_and_a_variable_links_lead_to_the_usual_port(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("flows/run_page.py", monkeypatch)
    monkeypatch.delenv("FFPRUNE_MLFLOW_URL", raising=False)
    assert module.mlflow_page("sqlite:///mlflow.db") == "http://127.0.0.1:5000"
