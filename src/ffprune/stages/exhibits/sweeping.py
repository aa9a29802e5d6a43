"""What a sweep runs: the methods of ``ffprune compare``, of chosen granularities and at other sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ffprune.compress.table import COMPRESSORS
from ffprune.core.errors import ParameterError
from ffprune.core.tables import look_up
from ffprune.stages.exhibits.papers import Choice, Row, comparison_methods, compressor_of

#: What `ffprune sweep` varies besides models, methods and sparsities.
Granularity = Literal["structured", "unstructured", "2:4", "4:8"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


def sweep_recipes(
    granularities: Sequence[str], sparsities: Sequence[float], methods: Sequence[str], full: bool
) -> dict[str, dict[str, Any]]:
    """The recipes of ``ffprune compare``, at other sparsities.

    Args:
        granularities: names of :data:`GRANULARITIES`.
        sparsities: removed / prunable; none: those of ``ffprune compare``. An N:M pattern has its own.
        methods: names; none: those of the short ``ffprune compare``.
        full: as many trials as its full variant.

    Returns:
        Method name -> complete recipe, as plain values; the dense model is among them, for the ratios.

    Raises:
        ParameterError: an unknown name, a sparsity that none can have, or a method that no granularity is of.
    """
    table = comparison_methods().rows
    for name in granularities:
        look_up(dict.fromkeys(GRANULARITIES), name, "the granularity")
    for share in sparsities:
        if not 0 < share < 1:
            raise ParameterError(
                f"sparsity {share:g} was asked for",
                "It is a share, removed / prunable weights: above 0 and below 1",
                "Change --sparsity, to 0.2 for a fifth",
            )
    usual = {row.method for row in table if row.sparsities and row.sparsities.short}
    fitting = [row for row in table if _granularity(row) in granularities]
    for name in methods:
        look_up({str(row.method): None for row in fitting}, name, f"the {' or '.join(granularities)} method")
    rows = []
    for row in fitting:
        if row.method not in (methods or usual):
            continue
        known = row.sparsities or Choice(short=(), full=())
        own = known.full if full else known.short or known.full
        at = tuple(sparsities) if sparsities and not row.pattern else own
        rows.append(row.model_copy(update={"sparsities": Choice[tuple[float, ...]](short=at, full=at)}))
    return comparison_methods().model_copy(update={"rows": tuple(rows)}).recipes(full)


def _granularity(row: Row) -> str:
    """SliceGPT and SVD-LLM count as structured: they make tensors smaller as well."""
    compressor = COMPRESSORS[compressor_of(str(row.method))]
    return row.pattern or ("unstructured" if compressor.granularity == "unstructured" else "structured")
