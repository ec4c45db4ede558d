"""qdpo's side of scripts/bench_data: from a file to token ids on disk, as `qdpo run` prepares them."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.rounds import Parent
from qdpo.data import prepare
from qdpo.data.tokens import sieve
from qdpo.model.base.load import load_tokenizer
from qdpo.model.device import peak_gib
from qdpo.settings import layered


class Silent:
    """A Watcher that says nothing."""

    def say(self, line: str) -> None: ...
    def begin(self, what: str, total: int, unit: str) -> None: ...
    def advance(self, units: int) -> None: ...
    def finish(self) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...


def main() -> None:
    parent = Parent()
    job = parent.job
    tokenizer = load_tokenizer(Path(job["folder"]))
    settings = ["model.path=given", f"data.path={job['file']}", f"data.max_tokens={job['max_tokens']}"]
    config = layered.resolve(settings).config.data
    parent.answer(peak_gib=peak_gib(torch.device("cpu")))
    while True:
        parent.wait()
        with TemporaryDirectory() as folder:
            begun = time.monotonic()
            data = prepare.prepare_data(config, tokenizer, seed=0, watcher=Silent(), scratch=Path(folder))
            sieve.save_pairs(Path(folder) / "train.safetensors", data.train)
            sieve.save_pairs(Path(folder) / "held_out.safetensors", data.held_out)
            seconds = time.monotonic() - begun
        parent.answer(
            seconds=seconds, pairs=len(data.train) + len(data.held_out), peak_gib=peak_gib(torch.device("cpu"))
        )


if __name__ == "__main__":
    main()
