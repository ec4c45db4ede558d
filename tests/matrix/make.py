"""One row of the matrix: a tiny model of a family taken through run, merge and export by the command line itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.matrix import cells
from tests.matrix.members import Member, save_member
from tests.matrix.processes import Ended, part, qdpo
from tests.matrix.rows import COLUMNS, Cell, Row

SETTINGS = {
    "preset": "demo", "model.dtype": "bf16", "data.limit": "24", "data.eval_limit": "4", "train.steps": "2",
    "train.learning_rate": "1e-3", "samples.count": "0", "output.name": "run", "output.dir": "runs",
    "cache.dir": "cache",
}  # fmt: skip
RUN = "runs/run"
NOT_PROVED = 7


def make_row(member: Member, place: Path, has_forecast: bool = True, llama_cpp: Path | None = None) -> Row:
    """Builds the family's model in the new folder `place` and tries everything on it.

    `llama_cpp` holds the sources whose converter is tried where qdpo writes no GGUF itself.
    """
    place.mkdir(parents=True)
    maker = _Maker(Row(member.kind, member.name, member.model_type), member, place, llama_cpp)
    made = maker.part("make", lambda: save_member(member, place / "base"))
    if made.code:
        maker.row.cells = dict.fromkeys(COLUMNS, Cell(None, "–", f"no tiny model of it can be built: {made.why}"))
    else:
        maker.fill(has_forecast)
    return maker.row


class _Maker:
    def __init__(self, row: Row, member: Member, place: Path, llama_cpp: Path | None):
        self.row, self.member, self.place, self.llama_cpp = row, member, place, llama_cpp

    def part(self, name: str, act: Callable[[], Any]) -> Ended:
        ended = part(act, self.place / f"{name}.txt")
        self.row.seconds = round(self.row.seconds + ended.seconds, 1)
        return ended

    def qdpo(self, name: str, *words: str) -> Ended:
        ended = qdpo(words, self.place, self.place / f"{name}.txt")
        self.row.seconds = round(self.row.seconds + ended.seconds, 1)
        if ended.code == 1 or ended.code < 0 or "Traceback (most recent call last)" in ended.text:
            self.row.bugs.append(f"{words[0]}: {ended.why}")
        return ended

    def fill(self, has_forecast: bool) -> None:
        from tests.matrix.converter import convert
        from tests.matrix.exact import differences, weights_in_four_bits
        from tests.matrix.forecast import compare
        from tests.matrix.served import load_on_served_class

        row, base, run = self.row, self.place / "base", self.place / RUN
        weights = self.part("weights", lambda: weights_in_four_bits(base))
        row.model = weights.found["kind"] if weights.found else ""
        trained = self.qdpo("run", "run", "model.path=base", *(f"{name}={value}" for name, value in SETTINGS.items()))
        exact = self.part("exact", lambda: differences(base, self.place / "adapter"))
        found = row.cells
        found["loads"] = cells.loads(weights)
        found["trains"] = cells.trains(trained, run)
        found["attention"] = cells.attention(trained)
        found["fast parts"] = cells.fast_parts(trained)
        found["4 bit"] = cells.four_bit(weights)
        found["LoRA"] = cells.lora(trained, weights, exact, run)
        found["exact"] = cells.exact(exact)
        if has_forecast:
            traces = self.place / "traces"
            found["forecast"] = cells.forecast(self.part("forecast", lambda: compare(self.member, traces)))
        else:
            found["forecast"] = Cell(None, "–", "left out by --no-forecast")
        if trained.code:
            found |= dict.fromkeys(("merge", "served", "GGUF"), Cell(None, "–", "it does not train"))
            return
        merged, again = self.qdpo("merge", "merge", RUN, "--json"), None
        if merged.code == NOT_PROVED:
            again = self.qdpo("merge-fp32", "merge", RUN, "--json", "--dtype", "fp32")
        found["merge"] = cells.merge(merged, again)
        exported = self.qdpo("peft", "export", RUN, "--to", "peft")
        served = None
        if exported.code == 0:
            served = self.part("served", lambda: load_on_served_class(base, run / "export" / "peft"))
        found["served"] = cells.served(exported, served)
        own, converted = self.qdpo("gguf", "export", RUN, "--to", "gguf"), None
        if self.llama_cpp and cells.names_converter(own, found["merge"]):
            sources, model, out = self.llama_cpp, run / "merged", self.place / "converted.gguf"
            converted = self.part("converter", lambda: convert(sources, model, out))
        found["GGUF"] = cells.gguf(own, found["merge"], converted)
