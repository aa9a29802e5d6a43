"""The model card (README.md) of an exported folder: what is known of the model, and "unknown" where nothing is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ffprune.export.inspection import Inspection
from ffprune.export.markdown import markdown_table
from ffprune.export.provenance import Provenance

_UNKNOWN = "unknown"
_SOME = 0.0005
"""Zeros that are worth telling (share); single weights are zero in any model."""


def model_card(known: Provenance, found: Inspection, picture: str | None) -> str:
    """A model card in Markdown, with the metadata that the Hugging Face hub reads on top.

    Args:
        known: the model's history.
        found: what its folder holds.
        picture: file name of the policy's picture beside the card; None: there is none.
    """
    parts = [
        _metadata(known),
        f"# {known.name}",
        _summary(known, found),
        "## Source model",
        _facts({"license": known.license or _UNKNOWN, **known.source}) if known.source else _no_source(known),
        "## Method",
        _facts(known.method) if known.method else "Unknown: nothing but the model's own files was at hand.",
        "## Policy",
        *([f"![What is left of every layer]({picture})"] if picture else []),
        _policy(found),
        "## Results",
        _results(known.results),
        "## How to load it",
        _loading(found),
    ]
    if known.params:
        settings = yaml.safe_dump(dict(known.params), sort_keys=False).rstrip()
        parts += ["## Data and parameters", "`params.yaml` of the run:", f"```yaml\n{settings}\n```"]
    if known.runs:
        parts += ["MLflow runs:", _facts(known.runs)]
    return "\n\n".join(parts) + "\n"


def changed(found: Inspection) -> bool:
    """Whether anything was taken from the model."""
    return found.removed > 0 or found.zeros >= _SOME


def _metadata(known: Provenance) -> str:
    values: dict[str, Any] = {"license": known.license or _UNKNOWN, "library_name": "transformers"}
    if known.base_model is not None:
        values["base_model"] = known.base_model
    values |= {"pipeline_tag": "text-generation", "tags": ["ffprune", "pruned"]}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _summary(known: Provenance, found: Inspection) -> str:
    source = known.source.get("name", "A model of unknown origin")
    done = []
    if found.removed > 0:
        done.append(
            f"{found.removed:.1%} of the weights of its decoder layers' projections removed: the tensors are smaller"
        )
    if found.zeros >= _SOME:
        done.append(f"{found.zeros:.1%} of the weights {'that are left ' if done else ''}set to zero")
    return (
        f"{source}{' with ' + '; '.join(done) if done else ', as it is'}. {found.parameters:,} parameters "
        f"({found.architecture}, {found.dtype}, {found.bytes / 1e6:,.1f} MB). Made with ffprune."
    )


def _no_source(known: Provenance) -> str:
    return f"Unknown. License: {known.license or _UNKNOWN}."


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _policy(found: Inspection) -> str:
    """A row a layer; zeros only where there are any."""
    zeros = found.zeros >= _SOME
    rows = [
        [
            str(row.layer),
            *(f"{now} of {whole}" for now, whole in (row.heads, row.groups, row.channels)),
            f"{row.weights:,}",
            *([f"{row.zeros:.1%}"] if zeros else []),
        ]
        for row in found.layers
    ]
    header = ["layer", "query heads", "key/value heads", "FFN channels", "weights", *(["zero"] if zeros else [])]
    return markdown_table(header, rows)


def _results(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return "Not known: no evaluation of these files was at hand."
    protocol, dense, row = results["protocol"], results["dense"], results["row"]
    models = {"dense": dense, "this model": row}
    cells = [
        [
            name,
            "not finite" if values["perplexity"] is None else f"{values['perplexity']:.3f}",
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
    tasks = [
        [
            model,
            task,
            *(f"{score.get(key, float('nan')):.3f}" for key in ("acc", "acc_stderr")),
            str(score.get("n", "")),
        ]
        for model, found in asked.items()
        for task, score in found.items()
    ]
    zero_shot = [markdown_table(["model", "task", "accuracy", "standard error", "items"], tasks)] if tasks else []
    return "\n\n".join([text, shown, *zero_shot])


def _loading(found: Inspection) -> str:
    if not found.needs_code:
        return (
            "All layers are alike: an ordinary model.\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```'
        )
    return """\
Layers differ in width (`per_layer_config` in config.json), which transformers alone does not build. Three ways:

```python
# 1. With ffprune installed: transformers' own classes then build it.
import ffprune
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER")

# 2. With transformers alone, by the code in modeling_pruned.py: read it first.
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)

# 3. By ffprune's own loader, which checks every tensor before it reads it.
import ffprune
model = ffprune.load_model("FOLDER")
```"""
