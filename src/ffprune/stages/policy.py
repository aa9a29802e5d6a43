"""``ffprune policy``: what to keep at any sparsity, by what a guided search has learnt; no model runs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffprune.allocate.dynamic import coin, dynamic_programming
from ffprune.allocate.guided import is_guided, taught
from ffprune.core.errors import ParameterError
from ffprune.core.units import Allocation
from ffprune.models.checkpoint import read_view
from ffprune.stages import artifacts
from ffprune.stages.budget import Budget
from ffprune.stages.params import load_params
from ffprune.stages.record import CURVES, DENSE, SEARCH_AGENT, SEARCH_POLICY


@dataclass(frozen=True)
class Answer:
    """A policy, and what is known of it.

    Attributes:
        budget: what sparsities are shares of.
        target: the sparsity that was asked for.
        served: least and greatest sparsity that the search learnt for.
        allocation: the policy.
        removed: share of each cost that it removes.
        loss: predicted, nats a token above the dense model.
        stderr: its standard deviation, by the model of the loss.
    """

    budget: str
    target: float
    served: tuple[float, float]
    allocation: Allocation
    removed: dict[str, float]
    loss: float
    stderr: float


def policy_at(sparsity: float) -> Answer:
    """The best policy under the model of the loss that the stage search left; candidates are not compared.

    Raises:
        MissingInput: the search has not run.
        ParameterError: it was not a guided one.
        UnreachableSparsity: no policy inside the bounds has this sparsity.
    """
    params = load_params()
    found = artifacts.read_json(artifacts.require(Path(SEARCH_POLICY)))
    trained = artifacts.read_tensors(artifacts.require(Path(SEARCH_AGENT)))
    if not is_guided(trained):
        raise ParameterError(
            "A policy was asked for by what a search has learnt",
            "Only the guided search learns a model of the loss, and the last one was not guided",
            "Set search.agent to guided and run 'dvc repro search', or set transfer.sparsity and run 'make run'",
        )
    view = read_view(artifacts.require(Path(DENSE)), params.units.heads)
    budget, bounds = Budget.on(view, found["budget"]), params.search.bounds()
    budget.check(sparsity, bounds)
    curves = [np.array(row["loss"]) for row in artifacts.read_json(artifacts.require(Path(CURVES)))]
    surrogate = taught(budget.units, curves, trained)
    step = coin(budget.units, params.search.step)
    best = dynamic_programming(budget.units, surrogate.curves, sparsity, bounds, step)
    mean, deviation = surrogate.predict([best.kept])
    sparsities = [row["sparsity"] for row in found["front"]]
    served = (min(sparsities), max(sparsities))
    return Answer(
        budget.facts["name"], sparsity, served, best, budget.removed(best), float(mean[0]), float(deviation[0])
    )


def print_policy(sparsity: float, as_json: bool) -> None:
    """Print what :func:`policy_at` finds."""
    found = policy_at(sparsity)
    low, high = found.served
    if not low - 0.005 <= sparsity <= high + 0.005:
        print(
            f"warning: the search learnt for {low:.2g} to {high:.2g} (search.guide.low and high); at {sparsity:g} its "
            "model of the loss guesses",
            file=sys.stderr,
        )
    if as_json:
        print(json.dumps(_rows(found), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=100)
    shares = ", ".join(f"{share:.1%} of {cost}" for cost, share in found.removed.items())
    console.print(f"{sparsity:.1%} of {found.budget} asked for; removes {shares}", highlight=False)
    console.print(
        f"predicted loss: {found.loss:.3f} ± {found.stderr:.3f} nats a token above the dense model", highlight=False
    )
    table = Table()
    for column in ("layer", "unit", "kept", "of", "share"):
        table.add_column(column, justify="right")
    for unit, kept in zip(found.allocation.units, found.allocation.kept, strict=True):
        table.add_row(str(unit.layer), unit.kind, str(kept), str(unit.granules), f"{kept / unit.granules:.0%}")
    console.print(table)
    console.print(
        f"To cut, repair and measure it: ffprune params set transfer.sparsity={sparsity:g}, then make run",
        highlight=False,
    )


def _rows(found: Answer) -> dict[str, object]:
    """As ``data/search/policy.json`` has it."""
    return {
        "budget": found.budget,
        "sparsity_target": found.target,
        "sparsity": found.allocation.sparsity,
        "removed": found.removed,
        "predicted_loss": found.loss,
        "predicted_stderr": found.stderr,
        "units": found.allocation.to_rows(),
    }
