"""Plans a run before anything is loaded: whether it fits a card, why, and how long it may take; no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data.positions import within_positions
from qdpo.errors import ConfigError
from qdpo.families import known, shapes
from qdpo.families.config_fields import Positions
from qdpo.families.known import ModelFacts
from qdpo.families.serving import serving_of, ships_as
from qdpo.families.shapes import AnyShape, FindTrace
from qdpo.forecast import choose, lengths, memory, timing
from qdpo.forecast.choose import Choice, Lengths, Way
from qdpo.forecast.lengths import Known
from qdpo.forecast.memory import GIB, MemorySettings
from qdpo.forecast.notes import notes as notes_of
from qdpo.run import identity
from qdpo.settings import layered
from qdpo.settings.layered import Resolved
from qdpo.settings.loss_rules import couples_pairs, needs_reference
from qdpo.settings.schema import RunConfig

# Bytes of a weight in the forms that makers ship. MXFP4: 17/32 for each expert's, 2 for the others of gpt-oss-20b,
# which are 0.6 of its 19.7 billion outside the tables.
STORED_BYTES = {"FP8": 1.0, "MXFP4": 0.58}
OTHERS_GIB = 0.7
"""Memory that a desktop takes from a card by default, in GiB."""
SAMPLE_SPEED = 30.0
"""Tokens a second of all prompts together while samples are generated: a guess."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast with its verdict; bytes, tokens and seconds."""

    model: str
    shape_from: str
    card: str
    card_gib: float
    others_gib: float
    known: Known
    chosen: Choice
    limit: float
    causes: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]
    steps: int | None
    tokens: float | None
    seconds: dict[str, float] | None
    capped_hours: float | None
    ways: list[Way]
    facts: ModelFacts | None = None
    """Licence, context and thinking switch, for a model that ships."""
    ships_as: str | None = None
    """The ways out of a run, where config.json names the model's class."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.chosen.peak <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Everything in plain numbers: bytes, tokens, seconds."""
        run, found = self.chosen.run, self.known.lengths
        return {
            "model": self.model, "shape_from": self.shape_from, "facts": self.facts and vars(self.facts),
            "ships_as": self.ships_as,
            "card": self.card, "card_gib": self.card_gib, "others_gib": self.others_gib, "fits": self.fits,
            "peak_bytes": self.chosen.peak, "limit_bytes": self.limit, "by_cause_bytes": self.causes,
            "host_bytes": self.host, "disk_bytes": self.disk,
            "settings": {
                "memory.tokens_per_row": self.chosen.tokens_per_row, "memory.kept_layers": run.kept_layers,
                "memory.offload": run.offload, "memory.embeddings": "host" if run.host_embeddings else "device",
            },
            "lengths": {"longest_pair": found.longest, "mean_pair": found.mean, "from": self.known.how},
            "pairs": self.known.pairs, "steps": self.steps, "tokens": self.tokens, "estimated_seconds": self.seconds,
            "ways_out": [vars(way) for way in self.ways], "notes": list(self.notes),
        }  # fmt: skip


def make_plan(
    resolved: Resolved,
    *,
    gpu_gib: float | None = None,
    card: str | None = None,
    others_gib: float | None = None,
    like: str | None = None,
    read_data: bool = True,
    trace: FindTrace | None = None,
) -> Plan:
    """The forecast of a run on a card: the named one, one of `gpu_gib`, or the preset's.

    `trace` makes the shape of a model without a formula whose trace does not ship.
    Without `read_data` lengths are assumed, even if a run here has prepared its pairs.
    Raises: ConfigError for a model without a known shape, an unknown card, or a limit below the fixed part.
    """
    config = resolved.config
    shape, source = shapes.of_model(str(config.model.path), revision=config.model.revision, like=like, trace=trace)
    path = str(config.model.path)
    notes: list[str] = []
    if not Path(path).expanduser().exists() and known.is_refused_copy(path):
        original = known.known_name(path)
        notes.append(f"by its name, {path} is a quantised copy that a run refuses; take model.path={original}")
    limit_positions = None if shape.positions is None else Positions(shape.positions, has_table=False)
    config = within_positions(resolved, limit_positions, notes.append)
    cuda = config.model.device != "cpu"
    card, gib, others = _card(resolved, card, gpu_gib, others_gib, cuda)
    optimizer = str(config.train.optimizer)
    if optimizer == "auto":
        optimizer = "paged_adamw8bit" if cuda else "adamw8bit"
    element = 4 if config.model.dtype == "fp32" else 2
    run = choose.settings_of(
        config.model, config.adapter, config.memory, optimizer=optimizer, element=element, cuda=cuda
    )
    pairs = _known(resolved, config, read_data)
    limit = (gib - others) * GIB * choose.PLANNED_SHARE
    smallest = choose.smallest_fixed_part(shape, run)
    if limit < smallest:
        raise ConfigError(
            f"{gib:g} GiB less {others:g} GiB for other programs is too little: {config.model.path} takes at least "
            f"{choose.least(shape, run)}. {choose.smaller(shape, gib)}"
        )
    given = choose.given_of(config.memory, shape)
    chosen = choose.choose(shape, run, pairs.lengths, given, limit=limit)
    ways = [] if chosen.peak <= limit else choose.ways_out(
        shape, run, pairs.lengths, given, limit=limit, max_tokens=config.data.max_tokens
    )  # fmt: skip
    steps, tokens = _steps(config, pairs)
    seconds = None if tokens is None or not cuda else _seconds(config, shape, chosen, pairs, tokens, timing.CARDS[card])
    notes += notes_of(config.adapter, shape, timed=seconds is not None)
    return Plan(
        model=str(config.model.path),
        shape_from=source,
        card=card,
        card_gib=gib,
        others_gib=others,
        known=pairs,
        chosen=chosen,
        limit=limit,
        causes=memory.forecast(shape, chosen.run, chosen.row),
        host=memory.host_bytes(shape, chosen.run, chosen.row),
        disk=_disk(config, shape, run, pairs),
        steps=steps,
        tokens=tokens,
        seconds=seconds,
        capped_hours=config.train.hours,
        ways=ways,
        ships_as=_ships_as(str(config.model.path), config.model.revision),
        facts=_facts(str(config.model.path)),
        notes=tuple(notes),
    )


def _facts(path: str) -> ModelFacts | None:
    """Those of a known hub id; a folder of that name may hold anything."""
    if Path(path).expanduser().exists() or known.known_name(path) is None:
        return None
    return known.facts(path)


def _card(
    resolved: Resolved, card: str | None, gib: float | None, others: float | None, cuda: bool
) -> tuple[str, float, float]:
    _check_card(card)
    if not cuda:
        import psutil

        available = psutil.virtual_memory().available / GIB
        return "cpu", gib if gib is not None else available, 0.0 if others is None else others
    if gib is None:
        gib = timing.CARDS[card].gib if card else resolved.config.memory.limit_gib or layered.card_gib(resolved.preset)
    if gib is None:
        raise ConfigError("How much memory has the card? Give --gpu-gib=N, --card=NAME, or a preset.")
    return card or timing.card_for(gib), gib, OTHERS_GIB if others is None else others


def _check_card(card: str | None) -> None:
    if card is not None and card not in timing.CARDS:
        raise ConfigError(f"--card={card} is not known. {layered.nearest(card, list(timing.CARDS))}")


def usable(gib: float, card: str | None, others_gib: float | None) -> tuple[float, str]:
    """Bytes of a card that can be planned for, and the card's name. Raises: ConfigError for an unknown card."""
    _check_card(card)
    others = OTHERS_GIB if others_gib is None else others_gib
    return (gib - others) * GIB * choose.PLANNED_SHARE, card or timing.card_for(gib)


def _known(resolved: Resolved, config: RunConfig, read_data: bool) -> Known:
    if not read_data:
        return lengths.assumed(config)
    found = lengths.prepared(identity.run_folder(resolved), config)
    if found is not None:
        return found
    path = str(config.data.path)
    here = path.startswith("bundled:") or Path(path).expanduser().exists()
    if here:
        return lengths.sampled(config, _tokenizer_file(config))
    if not resolved.origins.get("data.path", "").startswith("preset"):
        raise ConfigError(
            f"data.path={path} is not on this machine, and a plan downloads nothing. Give a file, or leave out "
            "data.path: the plan then assumes the longest pairs that data.max_tokens allows."
        )
    return lengths.assumed(config)


def _tokenizer_file(config: RunConfig) -> Path | None:
    """The model's tokenizer.json, if it is on this machine."""
    path = Path(str(config.model.path)).expanduser() / "tokenizer.json"
    if path.is_file():
        return path
    cached = shapes.cached_file(str(config.model.path), "tokenizer.json", config.model.revision)
    return cached


def _steps(config: RunConfig, known: Known) -> tuple[int | None, float | None]:
    """Optimizer steps, and tokens of the training pairs over all of them."""
    size = config.train.pairs_per_step
    if config.train.steps is not None:
        return config.train.steps, config.train.steps * size * known.lengths.mean
    if known.pairs is None:
        return None, None
    total = max(1, round(config.train.epochs * known.pairs))
    return math.ceil(total / size), total * known.lengths.mean


def _seconds(
    config: RunConfig, shape: AnyShape, chosen: Choice, known: Known, tokens: float, card: timing.Card
) -> dict[str, float]:
    """Estimated seconds by phase: training, reference (each pair once), evaluations, samples."""
    found = known.lengths
    filled = Lengths(
        int(found.mean), int(found.mean_prompt), found.mean, found.mean_prompt, found.pairs_per_step
    ).row(min(chosen.tokens_per_row or int(found.mean), found.step))  # fmt: skip
    step, score = (
        timing.row_seconds(shape, chosen.run, filled, card, scoring=scoring) / filled.tokens
        for scoring in (False, True)
    )
    rounds = 2 + (tokens / found.mean / found.pairs_per_step) // config.train.eval_every
    pairs = known.pairs or tokens / found.mean
    held_out = min(config.data.eval_limit, max(1.0, pairs * (config.data.eval_fraction or 0.05)))
    phases = {
        "training": tokens * (step + (score if couples_pairs(config.loss.name) else 0)),
        "reference": (pairs + held_out) * found.mean * score if needs_reference(config.loss.name) else 0.0,
        "evaluations": rounds * held_out * found.mean * score,
        "samples": (rounds if config.samples.every_eval else 2)
        * config.samples.count
        * config.samples.max_new_tokens
        / SAMPLE_SPEED,
    }
    return {name: value for name, value in phases.items() if value > 0}


def _stored_bytes(path: str) -> float:
    """Bytes of a weight outside the tables, as the maker ships it; 2 for copies of others, which may be in any form."""
    facts = known.facts(path) if known.known_name(path) == path else None
    return STORED_BYTES.get(facts.quantised or "", 2.0) if facts else 2.0


def _disk(config: RunConfig, shape: AnyShape, run: MemorySettings, known: Known) -> dict[str, float]:
    """Bytes on disk: downloaded once, and written by the run."""
    numbers = memory.adapter_numbers(shape, run.rank)
    pairs = known.pairs or 0
    each = 4 + memory.STATE_BYTES[run.optimizer]
    weights = _stored_bytes(str(config.model.path)) * (shape.linear_weights + shape.expert_weights)
    return {
        "model download": weights + 2.0 * memory.table_numbers(shape),
        "checkpoints and adapter": numbers * (each * (config.train.keep_checkpoints + 1) + 4.0),
        "token ids and reference cache": pairs * known.lengths.mean * 8.0,
    }


def _ships_as(path: str, revision: str | None) -> str | None:
    content = shapes.config_here(path, revision)
    serving = None if content is None else serving_of(content)
    return None if serving is None else ships_as(serving)


def print_plan(plan: Plan, say: Callable[[str], None]) -> None:
    """The plan as text."""
    chosen, run = plan.chosen, plan.chosen.run
    say(f"model   {plan.model} ({plan.shape_from})")
    if plan.facts is not None:
        say(f"        {plan.facts.line}")
    if plan.ships_as is not None:
        say(f"ships   as {plan.ships_as}")
    spare = f"{1 - choose.PLANNED_SHARE:.0%} to spare"
    if plan.card == "cpu":
        say(f"memory  {plan.card_gib:.1f} GiB of the host, {spare}")
    else:
        say(f"card    {plan.card_gib:g} GiB ({plan.card}), {plan.others_gib:g} of it held by other programs, {spare}")
    for note in plan.notes:
        say(note)
    say(f"pairs   longest {plan.known.lengths.longest:,} tokens, mean {plan.known.lengths.mean:,.0f}; {plan.known.how}")
    say(
        f"rows    {chosen.tokens_per_row:,} tokens, {run.kept_layers} layer{'s' * (run.kept_layers != 1)} kept"
        + (", inputs of the others wait on the host" if run.offload else "")
        + (", embedding table on the host" if run.host_embeddings else "")
    )
    say("")
    for name, value in {**plan.causes, "together": chosen.peak}.items():
        if value >= 0.005 * GIB:
            say(f"  {name:28} {value / GIB:7.2f} GiB")
    host = {} if plan.card == "cpu" else {"host": plan.host}
    for title, parts in {**host, "disk": plan.disk}.items():
        shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value >= 0.05 * GIB)
        say(f"{title}    {sum(parts.values()) / GIB:.1f} GiB ({shown or 'less than 0.05 each'})")
    if plan.steps is not None and plan.tokens is not None:
        say(f"steps   {plan.steps:,}, {plan.tokens / 1e6:.2f} million tokens of training pairs")
    if plan.seconds is not None:
        parts_text = ", ".join(f"{name} {_duration(value)}" for name, value in plan.seconds.items())
        say(f"time    about {_duration(sum(plan.seconds.values()))} on {plan.card}, an estimate ({parts_text})")
        if plan.capped_hours is not None and sum(plan.seconds.values()) > plan.capped_hours * 3600:
            say(f"        train.hours={plan.capped_hours:g} will shorten the run to that")
    say("")
    free = f"{plan.limit / GIB:.1f} GiB can be planned for"
    if plan.fits:
        say(f"FITS: {chosen.peak / GIB:.1f} GiB at the peak, {free}")
    else:
        say(f"DOES NOT FIT: {chosen.peak / GIB:.1f} GiB at the least, {free}. {choose.advice(plan.ways)}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
