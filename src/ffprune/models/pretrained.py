"""Pruned models by ``AutoModelForCausalLM.from_pretrained``: with ffprune imported, or with code in the model's folder.

Folders keep the ``model_type`` of their family, so that tools that know the family know the model. transformers would
take such a folder for a stock model and refuse it for its shapes; ``auto_map`` names the class that knows better.
"""

from __future__ import annotations

import os
from pathlib import Path
from pprint import pformat
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ffprune.models import modeling_pruned
from ffprune.models.families import FAMILIES, family_of

CODE_FILE = "modeling_pruned.py"
_AUTO_CLASS = "AutoModelForCausalLM"


def needs_code(config: PretrainedConfig) -> bool:
    """Whether layers differ, so that transformers alone would build others."""
    return "per_layer_config" in config.to_dict()


def write_code(folder: Path, config: PretrainedConfig) -> None:
    """Put the code that loads a pruned model next to it."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    layout = pformat(family_of(config).layout, sort_dicts=False, width=110)
    code = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    trailer = f"\n\nimport transformers  # noqa: E402\n\n{name} = pruned(transformers.{name}, {layout})\n"
    (folder / CODE_FILE).write_text(code + trailer, encoding="utf-8")


def name_code(config: PretrainedConfig) -> None:
    """Say in a config, in place, which class loads the model: the one of :func:`write_code` where layers differ."""
    others = {key: value for key, value in getattr(config, "auto_map", {}).items() if key != _AUTO_CLASS}
    ours = {_AUTO_CLASS: f"{Path(CODE_FILE).stem}.{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]}"}
    config.auto_map = {**others, **(ours if needs_code(config) else {})}
    if not config.auto_map:
        del config.auto_map


def is_ours(reference: object) -> bool:
    """Whether an entry of ``auto_map`` names code of ours, which ffprune itself does without."""
    return str(reference).startswith(Path(CODE_FILE).stem + ".")


def register() -> None:
    """Let ``AutoModelForCausalLM`` build pruned models of every family; others it builds as before."""
    for family in FAMILIES.values():
        base = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type])
        found = _saving(modeling_pruned.pruned(base, family.layout))
        AutoModelForCausalLM.register(CONFIG_MAPPING[family.model_type], found, exist_ok=True)


def _saving(found: Any) -> type[PreTrainedModel]:
    """The class, whose ``save_pretrained`` puts the code next to a model that needs it."""

    class Saving(found):  # type: ignore[misc]  # made just before
        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            name_code(self.config)
            saved = super().save_pretrained(save_directory, *args, **kwargs)
            if needs_code(self.config):
                write_code(Path(save_directory), self.config)
            return saved

    Saving.__name__ = Saving.__qualname__ = found.__name__
    # As transformers' own: a class from elsewhere would win over code in a folder that the user trusts.
    Saving.__module__ = found.__base__.__module__
    return Saving
