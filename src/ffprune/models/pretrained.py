"""Pruned models by transformers' own ``from_pretrained``: with ffprune imported, or with code in the model's folder.

Folders keep the ``model_type`` of their family, so that tools that know the family know the model. transformers would
take such a folder for a stock model and refuse it for its shapes; ``auto_map`` names the class that knows better.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from pprint import pformat
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ffprune.models import modeling_pruned
from ffprune.models.families import Family, family_of
from ffprune.models.fused import put_together

CODE_FILE = "modeling_pruned.py"
_AUTO_CLASS = "AutoModelForCausalLM"


def needs_code(config: PretrainedConfig) -> bool:
    """Whether layers differ, so that transformers alone would build others."""
    return "per_layer_config" in config.to_dict()


def write_code(folder: Path, config: PretrainedConfig) -> None:
    """Put the code that loads a pruned model next to it, if the config names it (:func:`name_code`)."""
    if not is_ours(getattr(config, "auto_map", {}).get(_AUTO_CLASS)):
        return
    family = family_of(config)
    name, layout = family.architecture, pformat(family.layout, sort_dicts=False, width=110)
    code = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    trailer = (
        f"\n\nimport transformers  # noqa: E402 - behind the copy\n\n{name} = pruned(transformers.{name}, {layout})\n"
    )
    (folder / CODE_FILE).write_text(code + trailer, encoding="utf-8")


def name_code(config: PretrainedConfig) -> None:
    """Say in a config, in place, which class loads the model: the one of :func:`write_code` where layers differ.

    A model that has a class of its own keeps it.
    """
    others = {key: value for key, value in getattr(config, "auto_map", {}).items() if not is_ours(value)}
    ours = {_AUTO_CLASS: f"{Path(CODE_FILE).stem}.{family_of(config).architecture}"}
    config.auto_map = {**(ours if needs_code(config) else {}), **others}
    if not config.auto_map:
        del config.auto_map


def is_ours(reference: object) -> bool:
    """Whether an entry of ``auto_map`` names code of ours, which ffprune itself does without."""
    return str(reference).startswith(Path(CODE_FILE).stem + ".")


def teach(family: Family, module: ModuleType) -> None:
    """Let a family's class in transformers build pruned models; others it builds as before.

    The class itself and not the registry of AutoModelForCausalLM: registering takes the classes of all families, and
    transformers imports that registry in the middle of importing them.

    Args:
        family: its row.
        module: ``transformers.models.PACKAGE.modeling_PACKAGE``, imported.
    """
    stock = getattr(module, family.architecture)
    taught = _saving(modeling_pruned.pruned(stock, family.layout))
    # transformers' lazy packages remember what they were asked for before.
    for owner in (module, *(sys.modules[name] for name in (module.__name__.rpartition(".")[0], "transformers"))):
        if vars(owner).get(family.architecture) is stock:
            setattr(owner, family.architecture, taught)


def _saving(found: Any) -> type[PreTrainedModel]:
    """The class, whose ``save_pretrained`` puts the code next to a model that needs it."""

    class Saving(found):  # type: ignore[misc]  # made just before
        def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
            name_code(self.config)
            with put_together(self):
                saved = super().save_pretrained(save_directory, *args, **kwargs)
            write_code(Path(save_directory), self.config)
            return saved

    Saving.__name__ = Saving.__qualname__ = found.__name__
    # It stands in for transformers' own, which pickles and tracebacks find by this name.
    Saving.__module__ = found.__base__.__module__
    return Saving
