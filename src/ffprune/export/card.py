"""The model card (README.md) of an exported folder: what is known of the model, and "unknown" where nothing is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

import ffprune
from ffprune.export.card_results import results_said
from ffprune.export.inspection import Inspection
from ffprune.export.markdown import markdown_table
from ffprune.export.provenance import Provenance

TRANSFORMERS = "5.23"
"""The least version of transformers that knows a config with ``per_layer_config``, as pyproject.toml asks for."""
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
        _metadata(known, found),
        f"# {known.name}",
        _summary(known, found),
        "## Source model",
        _facts({"license": known.license or _UNKNOWN, **known.source}) if known.source else _no_source(known),
        "## Method",
        _facts(known.method) if known.method else "Unknown: nothing but the model's own files was at hand.",
        "## Data",
        " ".join(known.data) or "Unknown.",
        "## Policy",
        *([f"![What is left of every layer]({picture})"] if picture else []),
        _policy(found),
        "## Results",
        results_said(known.results),
        "## How to load it",
        _loading(found),
    ]
    if known.params:
        settings = yaml.safe_dump(dict(known.params), sort_keys=False).rstrip()
        parts += ["## Parameters", "`params.yaml` of the run:", f"```yaml\n{settings}\n```"]
    if known.runs:
        parts += ["MLflow runs:", _facts(known.runs)]
    return "\n\n".join(parts) + "\n"


def changed(found: Inspection) -> bool:
    """Whether anything was taken from the model."""
    return found.removed > 0 or found.zeros >= _SOME


def _metadata(known: Provenance, found: Inspection) -> str:
    values: dict[str, Any] = {"license": known.license or _UNKNOWN, "library_name": "transformers"}
    if known.base_model is not None:
        values["base_model"] = known.base_model
    values |= {"pipeline_tag": "text-generation", "tags": ["ffprune", *(["pruned"] if changed(found) else [])]}
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
    if rounding := known.method.get("quantisation"):
        done.append(f"weights rounded ({rounding})")
    # Who made it is not known of a folder from elsewhere.
    made = f"Made with ffprune {known.version}" if known.version else f"Exported with ffprune {ffprune.__version__}"
    return (
        f"{source}{' with ' + '; '.join(done) if done else ', as it is'}. {found.parameters:,} parameters "
        f"({found.architecture}, {found.dtype}, {found.bytes / 1e6:,.1f} MB). {made}."
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


def _loading(found: Inspection) -> str:
    if not found.needs_code:
        return (
            f"All layers are alike: an ordinary model. Needs transformers >= {TRANSFORMERS}.\n\n"
            "```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```'
        )
    return f"""\
Layers differ in width (`per_layer_config` in config.json), which transformers alone does not build. Three ways:

```python
# 1. With ffprune installed: transformers' own classes then build it.
import ffprune
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER")

# 2. With transformers alone, by the code in modeling_pruned.py: read it first. Needs transformers >= {TRANSFORMERS}.
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)

# 3. By ffprune's own loader, which checks every tensor before it reads it.
import ffprune
model = ffprune.load_model("FOLDER")
```"""
