"""The weights of a folder's text model by name, without those of other parts of its checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from qdpo.model.base.folder import WEIGHTS, WEIGHTS_INDEX, read_json
from qdpo.model.base.weight_names import folder_names


@dataclass(frozen=True)
class WeightPlace:
    """The file that holds a weight, and the weight's name there."""

    path: Path
    key: str


def text_weights(folder: Path) -> dict[str, WeightPlace]:
    """Each weight that the text model takes as it is from a checked folder, by its name in the text model."""
    files = _files(folder)
    trained = folder_names(folder).trained
    return {
        name: WeightPlace(files[made_of[0]], made_of[0])
        for name, made_of in trained.sources.items()
        if len(made_of) == 1 and name not in trained.converted
    }


def weights(places: dict[str, WeightPlace], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named weights in the order of `names`, one at a time in memory."""
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt")) for path in {one.path for one in places.values()}
        }
        for name in names:
            yield name, opened[places[name].path].get_tensor(places[name].key)


def _files(folder: Path) -> dict[str, Path]:
    if not (folder / WEIGHTS).is_file():
        return {name: folder / shard for name, shard in read_json(folder / WEIGHTS_INDEX)["weight_map"].items()}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)
