"""Says before a run how its model can leave the run folder: merged, as GGUF, served. From names alone, without weights.

The names are those that `merge` and `export` look for after the training, so that none of them fails for its names.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from qdpo.errors import ConfigError
from qdpo.families.config_fields import family_of
from qdpo.families.gguf_exact import inexact
from qdpo.families.serving import Serving, serving_of, ships_as
from qdpo.model.base.folder import read_json
from qdpo.model.base.weight_names import FolderNames, folder_names, served_skeleton
from qdpo.model.policy.lora_file import module_of, tensor_forms
from qdpo.run.watcher import Say


class WaysOut:
    """Says the ways out once: before a download where the repository has an index of its tensors, else at the start."""

    def __init__(self, start: str | None, say: Say):
        self.start, self.say, self.said = start, say, False

    def look(self, folder: Path, stored: Collection[str]) -> None:
        """Before a download: `folder` holds config.json, `stored` are the names in the index.

        Raises: ConfigError if the files will not hold the model's text part.
        """
        names = folder_names(folder, stored)
        self._say(names, self._layers(names, None))

    def check(self, folder: Path, layers: Sequence[str] | None) -> None:
        """At the first start: `layers` will be adapted; None for those of adapter.start."""
        names = folder_names(folder)
        adapted = self._layers(names, layers)
        if not self.said:
            self._say(names, adapted)
        stacked = [layer for layer in adapted if layer not in names.trained.modules and "experts" in layer.split(".")]
        if stacked:
            what = f"It adapts stacked experts, such as {stacked[0]}"
            self.say(f"warning: this run cannot be merged; only its adapter can be used. {what}")
            return
        try:
            names.in_files(adapted)
        except ConfigError as error:
            self.say(f"warning: this run cannot be merged; only its adapter can be used. {error}")

    def _layers(self, names: FolderNames, layers: Sequence[str] | None) -> list[str]:
        if layers is not None:
            return list(layers)
        if self.start is not None:
            return list(dict.fromkeys(module_of(name) for name in tensor_forms(Path(self.start))))
        inside = f"{names.text.decoder}."
        of_layers = [name for name in names.trained.modules if name.startswith(inside) and "layers." in name]
        return [name for name in of_layers if names.trained.key(name)][:1]

    def _say(self, names: FolderNames, layers: Sequence[str]) -> None:
        serving = serving_of(read_json(names.folder / "config.json"))
        if serving is None:
            serving = Serving.unknown(names.served.__name__)
        family = family_of(names.text.config)
        if serving.gguf == "qdpo" and family and family.gguf and inexact(family.gguf, names.text.config):
            serving = serving.without_own_gguf()
        self.say(f"ships as: {ships_as(serving, _beginning(names, layers))}")
        self.said = True


def _beginning(names: FolderNames, layers: Sequence[str]) -> str | None:
    """The beginning of the adapter's names for servers; None if they are not known here."""
    known = [layer for layer in layers if names.trained.key(layer)][:1]
    try:
        found = names.on_servers(served_skeleton(names), known)
    except ConfigError:
        return None
    return next((name.partition("layers.")[0] for name in found.values() if "layers." in name), None)
