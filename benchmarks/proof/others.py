"""Stage 4: against TRL, on the same shape, pairs and memory, in turns.

Both sides build the same base from one seed, with a fresh adapter. Texts are random letters under a tokenizer of single
bytes; the ids that TRL makes of them are what qdpo trains on. Sides are loaded at the same time and take turns, so the
device must hold all of them beside each other. TRL's reference log-probs are computed before, as qdpo's are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.proof.fits import RUNTIME, met_or_unknown, said
from benchmarks.proof.items import NOT_MEASURED, OK, Item, Options, Result, Verdict
from benchmarks.proof.records import Records

SEVEN = "Qwen/Qwen2.5-7B"
# Lengths, card in GiB, ratio of pairs/s that is the goal.
AGAINST: tuple[tuple[str, float, float | None], ...] = (
    ("chat-like", 24, 2.5), ("HH-like", 24, 4.0), ("chat-like", 16, None), ("chat-like", 12, None),
    ("HH-like", 12, None), ("chat-like", 8, None),
)  # fmt: skip


def items(options: Options, records: Records) -> Iterator[Item]:
    runtime = records.now(2, RUNTIME)
    context = runtime.values["context_gib"] if runtime is not None and runtime.status == OK else None
    for lengths, card, _goal in AGAINST:
        job = {
            "model": SEVEN, "lengths": lengths, "card_gib": card, "context_gib": context, "python": options.trl_python
        }  # fmt: skip
        whole = {**options.job, **job}
        yield Item(4, name(lengths, card), "benchmarks.proof.turns", "turns", whole, expected_s=270, limit_s=420)


def name(lengths: str, card: float) -> str:
    return f"7B, {lengths}, {card:g} GiB"


def verdicts(results: Sequence[Result], options: Options) -> list[Verdict]:
    """The ratio to TRL's fastest side, where there is a goal for it."""
    goals = {name(lengths, card): goal for lengths, card, goal in AGAINST}
    found = []
    for result in results:
        goal = goals.get(result.item)
        if result.status == NOT_MEASURED:
            found.append(Verdict(result.item, said(result), None))
        elif result.status != OK:
            found.append(Verdict(result.item, said(result), met_or_unknown(result, options, met=False)))
        elif goal is not None:
            ratio = result.values["ratio"]
            text = "TRL does not fit" if ratio is None else f"{ratio:.2f} times TRL's fastest"
            met = ratio is None or ratio >= goal
            found.append(Verdict(f"{result.item}: {goal:g} times TRL", text, met_or_unknown(result, options, met=met)))
    return found


def table(results: Sequence[Result], records: Records) -> list[str]:
    lines = [f"{'':52}{'pairs/s':>9}{'before':>9}{'peak GiB':>10}{'tokens/pair':>13}"]
    for result in results:
        lines.append(result.item if result.status == OK else f"{result.item}: {said(result)}")
        earlier = records.before(result)
        known: dict[str, Any] = {} if earlier is None else earlier.values.get("sides", {})
        for title, side in result.values.get("sides", {}).items():
            if "error" in side:
                lines.append(f"    {title:48}  {side['error']}")
                continue
            before = known.get(title, {}).get("median_pairs_per_s")
            lines.append(
                f"    {title:48}{side['median_pairs_per_s']:9.3f}{'' if before is None else f'{before:.3f}':>9}"
                f"{side['peak_gib']:10.2f}{side['computed_tokens_per_pair']:13.0f}"
            )
        if result.values.get("ratio") is not None:
            lines.append(f"    {result.values['ratio']:.2f} times TRL's fastest")
    return lines
