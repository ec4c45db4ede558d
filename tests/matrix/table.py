"""The matrix for people: marks, what is wrong in a row, and the Markdown of docs/models.md."""

import re
from collections.abc import Iterator

from tests.matrix.rows import COLUMNS, Cell, Row

SHOWN = tuple(name for name in COLUMNS if name != "loads")
HEADS = {"4 bit": "in 4 bit", "LoRA": "LoRA on", "exact": "exact to", "merge": "merge", "served": "served"}
OLD = "where they say ✘, look at `qdpo plan` and at the first lines of a run."
GROUPS = {"text": "Text models", "folder": "Multimodal models, as folders, trained on text"}


def mark(cell: Cell) -> str:
    return {True: "✔", False: "✘", None: "–"}[cell.good]


def wrong(row: Row) -> list[str]:
    """What works wrongly without saying so."""
    found = [f"exit code 1: {bug}" for bug in row.bugs]
    found += [f"{name}: ✘ without a reason" for name, cell in row.cells.items() if cell.good is False and not cell.why]
    trains, exact, served = (row.cells[name] for name in ("trains", "exact", "served"))
    if trains.good and exact.good is not True:
        found.append(f"it trains and is not exact: {exact.why}")
    if served.good is False and "says nothing" in served.why:
        found.append(f"served: {served.why}")
    return found


def markdown(rows: list[Row]) -> str:
    """Both tables, and below them the reasons that their cells name by number."""
    reasons: dict[str, int] = {}
    lines: list[str] = []
    if old := sum(not row.commit for row in rows):
        lines += [f"The {old} rows with a ° were made before this version: {OLD}", ""]
    for kind, title in GROUPS.items():
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            lines += [f"**{title}** ({len(of_kind)})", "", *_table(of_kind, reasons), ""]
    lines += ["<details>", "<summary>The reasons by their numbers</summary>", ""]
    lines += [f"{number}. {_escaped(why)}" for why, number in reasons.items()]
    return "\n".join([*lines, "", "</details>"])


def summary(rows: list[Row]) -> str:
    """How many rows are right in each column."""
    return ", ".join(f"{name} {sum(row.cells[name].good is True for row in rows)}" for name in COLUMNS)


def _table(rows: list[Row], reasons: dict[str, int]) -> Iterator[str]:
    yield _line(["model", *(HEADS.get(name, name) for name in SHOWN)])
    yield _line(["---"] * (len(SHOWN) + 1))
    for row in rows:
        yield _line([row.name if row.commit else f"{row.name} °", *(_shown(row, name, reasons) for name in SHOWN)])


def _shown(row: Row, name: str, reasons: dict[str, int]) -> str:
    cell = row.cells[name]
    text = "✔" if cell.text == "yes" else "✘" if cell.text == "no" else cell.text
    if cell.good is False and text != "✘":
        text = f"✘ {text}"
    if cell.why and (cell.good is not True or name in ("attention", "LoRA", "merge")):
        text += f" [{reasons.setdefault(_general(row, cell.why), len(reasons) + 1)}]"
    return _escaped(text)


def _general(row: Row, why: str) -> str:
    """The reason without the model's own name, so that models share it."""
    for name in (row.name, row.model_type, row.name.partition(" ")[0]):
        why = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", "MODEL", why)
    return re.sub(r"(\w*experts)=\d+", r"\1=N", why).replace("MODEL_text", "MODEL")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
