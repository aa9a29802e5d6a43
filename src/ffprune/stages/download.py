"""download: fetch the dense model and the text, and split the text by article."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffprune.models.checkpoint import save_model
from ffprune.sources.base import ModelParams, Source, SplitSources, describe
from ffprune.sources.model import fetch_model
from ffprune.sources.split import join
from ffprune.sources.text import fetch_splits
from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.progress import Bars
from ffprune.stages.record import CALIBRATION, DENSE, DOWNLOADED, TEST, VALIDATION

CACHE = Path(".ckpt/sources")
"""Fetched files are kept here, checked again by their checksums at every use; not an output."""


def run(ctx: StageContext) -> None:
    """Fetch text first: it is small, and what is wrong with it is known before a large model is fetched."""
    params = ctx.params
    with Bars(ctx.progress) as bars:
        splits = fetch_splits(params.data, CACHE, bars.megabytes("download text", source=_shown(params.data.source)))
    facts = store_model(ctx, params.model, DENSE)
    sizes = {}
    for name, path in (("calibration", CALIBRATION), ("validation", VALIDATION), ("test", TEST)):
        text = join(splits[name])
        artifacts.write_text(ctx.path(path), text)
        sizes[name] = {"articles": len(splits[name]), "characters": len(text)}
    artifacts.write_json(ctx.path(DOWNLOADED), {"model": facts, "text": sizes})
    ctx.log_dict("download.json", {"model": facts, "text": sizes})


def store_model(ctx: StageContext, params: ModelParams, folder: str) -> dict[str, Any]:
    """Fetch a dense model into a folder; gives the facts of :func:`fetch_model`, and the run its name."""
    with Bars(ctx.progress) as bars:
        told = bars.megabytes("download model", source=_shown(params.source))
        model, tokenizer, facts = fetch_model(
            params.source, CACHE, params.trust_remote_code, params.storage_dtype, told
        )
        bars.at("save model", 0)
        save_model(model, tokenizer, ctx.path(folder))
    ctx.set_tags(model=str(facts["name"]))
    return facts


def _shown(source: Source | SplitSources) -> str:
    """A source beside a bar; of three, the last is as good as any."""
    return describe(source.test if isinstance(source, SplitSources) else source)
