"""fetch: one more dense model, of the section ``models``, as ``download`` fetches that of the section ``model``."""

from __future__ import annotations

from ffprune.stages import artifacts
from ffprune.stages.context import StageContext
from ffprune.stages.download import store_model


def run(ctx: StageContext) -> None:
    """Fetch and store the model; texts are those of ``download``, whatever the model."""
    folder, known = ctx.stage.outs
    facts = {"model": store_model(ctx, ctx.params.models[ctx.stage.key], folder)}
    artifacts.write_json(ctx.path(known), facts)
    ctx.log_dict("model.json", facts)
