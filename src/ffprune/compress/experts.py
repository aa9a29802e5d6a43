"""What can be done to models whose FFNs are mixtures of experts, and what is refused."""

from __future__ import annotations

from ffprune.compress.cut import REPAIRS
from ffprune.compress.table import COMPRESSORS
from ffprune.core.errors import UnsupportedArchitecture
from ffprune.models.view import ModelView


def check_experts(view: ModelView, key: str, compressor: str, repair: str | None, quantise: bool = False) -> None:
    """Refuse what a mixture of experts cannot have, before any work; other models pass.

    Args:
        view: of the model.
        key: the parameters that ask for it.
        compressor: row of :data:`ffprune.compress.table.COMPRESSORS`.
        repair: row of :data:`ffprune.compress.cut.REPAIRS`; None for none.
        quantise: whether weights are quantised as well.

    Raises:
        UnsupportedArchitecture: names what can be had.
    """
    if view.family.experts is None:
        return
    model = type(view.model).__name__
    if quantise or not COMPRESSORS[compressor].experts:
        possible = ", ".join(name for name, row in COMPRESSORS.items() if row.experts)
        raise UnsupportedArchitecture(
            f"{key} asks for the compressor {compressor}{' with quantize' if quantise else ''} of a {model}",
            "Experts lose whole channels; all else would need statistics of gate and up by expert, which are not kept. "
            f"Compressors for it are {possible}, without quantize",
            "Change the compressor, or choose a model without experts",
        )
    if repair is not None and not REPAIRS[repair].experts:
        possible = ", ".join(name for name, row in REPAIRS.items() if row.experts)
        raise UnsupportedArchitecture(
            f"{key} asks for the repair {repair} of a {model}",
            f"It relates the channels of all experts of a layer, and no such statistics are kept; there are {possible}",
            "Change the repair, or choose a model without experts",
        )
