"""Every compressor by name: what it removes, and which criteria and repairs go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ffprune.compress.cut import FLUCTUATION, REPAIRS
from ffprune.core.importance import CRITERIA
from ffprune.core.saliency import SALIENCIES

Granularity = Literal["structured", "unstructured", "hidden width", "rank", "none"]


@dataclass(frozen=True)
class Compressor:
    """One row.

    Attributes:
        paper: authors and year; ``ffprune`` for our own.
        section: where it is defined.
        granularity: what it removes. ``hidden width`` and ``rank`` have no units: the sparsity itself says how much.
        criteria: names of criteria that choose among granules; none where nothing is to choose.
        repairs: names of repairs; none where there is nothing to repair or it repairs by itself.
        patterns: whether N:M patterns go.
        quantises: whether GPTQ may follow.
        by_block: whether it works on one layer at a time, so that the others need not be on the device.
        saves: whether what it makes is a model of the same family, which a folder can hold.
        experts: whether it goes with mixtures of experts.
    """

    paper: str
    section: str
    granularity: Granularity
    criteria: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    patterns: bool = False
    quantises: bool = False
    by_block: bool = True
    saves: bool = True
    experts: bool = False

    @property
    def has_units(self) -> bool:
        """Whether an allocator says how much of every unit stays."""
        return self.granularity in ("structured", "unstructured")


COMPRESSORS: dict[str, Compressor] = {
    "none": Compressor("-", "the dense model", "none", quantises=True, experts=True),
    "mask": Compressor(
        "Sun et al. 2023", "zeroes; what is left stays", "unstructured", tuple(SALIENCIES), (), True, True
    ),
    "sparsegpt": Compressor(
        "Frantar and Alistarh 2023", "SparseGPT; MS Eq. 3", "unstructured", tuple(SALIENCIES), (), True, True
    ),
    "slice": Compressor(
        "FF, SS",
        "smaller tensors; FF section 2.3, SS section 3.2",
        "structured",
        (*CRITERIA, FLUCTUATION),
        tuple(REPAIRS),
        experts=True,
    ),
    "slicegpt": Compressor("Ashkboos et al. 2024", "SliceGPT, Eq. 1-10", "hidden width", by_block=False, saves=False),
    "svd_llm": Compressor("Wang et al. 2024", "SVD-LLM, truncation-aware whitening", "rank", saves=False),
}
