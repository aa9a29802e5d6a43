"""What a model card says of measurements: perplexity, speed, zero-shot tasks, and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ffprune.export.markdown import markdown_table

_TASKS = ["model", "task", "accuracy", "standard error", "items"]


def results_said(results: Mapping[str, Any] | None) -> str:
    """Results (:attr:`ffprune.export.provenance.Provenance.results`) in Markdown."""
    if results is None:
        return "Not known: no evaluation of these files was at hand."
    return _of_method(results) if "texts" in results else _of_pipeline(results)


def _of_pipeline(results: Mapping[str, Any]) -> str:
    protocol, dense, row = results["protocol"], results["dense"], results["row"]
    models = {"dense": dense, "this model": row}
    cells = [
        [
            name,
            _perplexity(values["perplexity"]),
            f"{values['params']:,}",
            f"{values['bytes'] / 1e6:,.1f}",
            f"{values.get('prefill_over_dense', 1):.2f}",
            f"{values.get('decode_over_dense', 1):.2f}",
        ]
        for name, values in models.items()
    ]
    text = (
        f"Perplexity on `{protocol['text']}`, which no step before the evaluation reads: {protocol['windows']} windows "
        f"of {protocol['seqlen']} tokens, {protocol['tokens']:,} scored tokens, {protocol['dtype']}, seed "
        f"{protocol['seed']}. The standard error of the dense model's mean loss is {dense['nll_stderr']:.2f} nats; "
        "both see the same windows. Speeds are tokens per second over the dense model's of the same rounds."
    )
    shown = markdown_table(["model", "perplexity", "parameters", "MB", "prefill / dense", "decode / dense"], cells)
    asked = {name: values["zero_shot"] for name, values in models.items() if "zero_shot" in values}
    return "\n\n".join([text, shown, *_zero_shot(asked)])


def _of_method(results: Mapping[str, Any]) -> str:
    rows = [
        [
            found["text"],
            _perplexity(found["perplexity"]),
            "not measured" if found["dense"] is None else _perplexity(found["dense"]),
            f"{found['windows']} x {found['seqlen']}",
            f"{found['tokens']:,}",
            "" if found["perplexity"] is None else f"{found['stderr']:.3f}",
        ]
        for found in results["texts"]
    ]
    header = ["text", "perplexity", "dense", "windows x tokens", "scored tokens", "standard error (nats)"]
    parts = [
        f"Perplexity, {results['dtype']}, seed {results['seed']}; the standard error is that of the mean loss. "
        f"The method left {results['params_after']:,} of the dense model's {results['params_before']:,} parameters.",
        markdown_table(header, rows),
    ]
    if speed := results["speed"]:
        parts.append(
            f"Tokens per second over the dense model's of the same rounds: prefill {speed['prefill_over_dense']:.2f}, "
            f"decode {speed['decode_over_dense']:.2f}."
        )
    return "\n\n".join([*parts, *_zero_shot({"this model": results["zero_shot"]})])


def _perplexity(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _zero_shot(asked: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of model -> task -> scores; none without tasks."""
    rows = [
        [
            model,
            task,
            *(f"{score.get(key, float('nan')):.3f}" for key in ("acc", "acc_stderr")),
            str(score.get("n", "")),
        ]
        for model, found in asked.items()
        for task, score in found.items()
    ]
    return [markdown_table(_TASKS, rows)] if rows else []
