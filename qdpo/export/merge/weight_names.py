"""Weight names of a model folder, without reading the weights, and a check that an adapter's layers are among them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from qdpo.errors import VerificationError
from qdpo.model.base.folder import WEIGHTS, WEIGHTS_INDEX, read_json


def weight_files(folder: Path) -> dict[str, Path]:
    """Weight name → file that holds it, for a folder that `model.folder` has checked."""
    if not (folder / WEIGHTS).is_file():
        return {name: folder / shard for name, shard in read_json(folder / WEIGHTS_INDEX)["weight_map"].items()}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


def weights(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named weights in the order of `names`, one at a time in memory."""
    files = weight_files(folder)
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(files.values())}
        for name in names:
            yield name, opened[files[name]].get_tensor(name)


def require_layers(modules: Iterable[str], folder: Path) -> None:
    """Raises: VerificationError if an adapted layer has no weight of that name in the base's checkpoint.

    A server that finds no layer for a name may ignore the adapter and serve the bare base (vLLM issue 34186).
    """
    known = weight_files(folder)
    missing = [module for module in modules if f"{module}.weight" not in known]
    if missing:
        near = next((name for name in known if name.endswith(f"{missing[0].split('.', 1)[-1]}.weight")), None)
        hint = f" The checkpoint has {near} instead." if near else ""
        raise VerificationError(
            f"{len(missing)} of the adapter's layers, such as {missing[0]}, are not in the checkpoint of {folder}."
            f"{hint} A server would ignore them silently. Serve the merged model: `qdpo merge`, then `--merged`."
        )
