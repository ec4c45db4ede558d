"""Stage 3: how fast? Tokens and pairs a second, and how much of the card's measured matrix rate does useful work.

One process for each model, kind of lengths and number of kept layers; it times rows of several lengths. One step of two
of them is profiled. Nothing is held to a smaller card here: layers are kept that would not fit one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.proof import settings
from benchmarks.proof.fits import met_or_unknown, said
from benchmarks.proof.items import OK, Item, Options, Result, Verdict
from benchmarks.proof.lengths import PROFILES, Profile, pairs_of, tiny
from benchmarks.proof.records import Records
from benchmarks.shares import shares
from qdpo.families import shapes
from qdpo.families.shapes import AnyShape
from qdpo.measure import random_base, steps
from qdpo.model import device
from qdpo.model.device import DTYPES, choose_device, choose_dtype
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import Loaded, make_policy, probe_pairs
from qdpo.train.step import optimizer
from qdpo.train.step.step import RowTooLarge

HERE = "benchmarks.proof.speed"
MODELS = {"7B": "Qwen/Qwen2.5-7B", "13B": "meta-llama/Llama-2-13b-hf"}
KEPT = ("all", "half", "none")
ROWS = (1024, 2048, 4096, 8192)
TIMED = 2
GOAL_ROWS, GOAL_UTILISATION = 4096, 0.45
PROFILED = (("7B", "chat-like", "all"), ("7B", "HH-like", "none"))


def items(options: Options, records: Records) -> Iterator[Item]:
    for model, kept, lengths in ((m, k, n) for m in MODELS for k in KEPT for n in PROFILES):
        job = {"model": MODELS[model], "lengths": lengths, "kept": kept}
        yield Item(3, name(model, lengths, kept), HERE, "speed", {**options.job, **job}, expected_s=60)
        if (model, lengths, kept) in PROFILED:
            title = f"profile: {name(model, lengths, kept)}, rows of {GOAL_ROWS:,}"
            yield Item(3, title, HERE, "profile", {**options.job, **job}, expected_s=45)


def name(model: str, lengths: str, kept: str) -> str:
    return f"{model}, {lengths}, {kept} kept"


class Ready:
    """A policy on random weights with its pairs."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.profile: Profile = tiny(PROFILES[job["lengths"]]) if job["tiny"] else PROFILES[job["lengths"]]
        # Where kept layers are many, a step is cheaper in memory with nothing else on the host.
        words = (f"model.path={job['model']}", "memory.offload=false", "memory.embeddings=device", "adapter.rank=16")
        resolved = settings.resolve(job, *words, "memory.head_tile_mib=192")
        device = choose_device(resolved.config.model.device, print)
        self.dtype = choose_dtype(resolved.config.model.dtype, device, print)
        architecture = random_base.config_for(str(resolved.config.model.path), None)
        self.shape: AnyShape = shapes.from_config(architecture.to_dict(), str(resolved.config.model.path))
        layers = self.shape.layers
        kept = {"all": layers, "half": layers // 2, "none": 0}[job["kept"]]
        section = resolved.config.memory.model_copy(update={"kept_layers": kept})
        train = resolved.config.train.model_copy(update={"pairs_per_step": self.profile.pairs_per_step})
        self.config: RunConfig = resolved.config.model_copy(update={"memory": section, "train": train})
        self.rate = steps.matrix_rate(device, DTYPES[self.dtype])
        torch.manual_seed(0)
        model = random_base.random_base(
            architecture, quantization=self.config.model.quantization, double_quant=self.config.model.double_quant,
            dtype=DTYPES[self.dtype], device=device,
        )  # fmt: skip
        self.pairs = pairs_of(self.profile, (1 + TIMED) * self.profile.pairs_per_step, self.shape.vocabulary)
        self.loaded: Loaded = make_policy(
            self.config, model, device=device, dtype=self.dtype, probe_with=probe_pairs(self.pairs), say=print
        )
        self.device = device
        self.optimizer = optimizer.choose_optimizer("auto", device, print)

    def steps(self, rows: int) -> Iterator[steps.TimedStep]:
        """A step to warm up, and TIMED more."""
        return steps.timed_steps(
            self.config, self.loaded, self.pairs, tokens_per_row=rows, optimizer_name=self.optimizer
        )


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """A point for each length of rows; one that does not fit says so, and the others go on."""
    ready = Ready(job)
    points: list[dict[str, Any]] = []
    for rows in (64, 128) if job["tiny"] else ROWS:
        device.release_memory(ready.device)
        if ready.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ready.device)
        try:
            _first, *timed = ready.steps(rows)
        except (torch.cuda.OutOfMemoryError, RowTooLarge) as error:
            points.append({"rows": rows, "error": str(error)})
            continue
        seconds, tokens = [step.seconds for step in timed], sum(step.tokens for step in timed)
        useful = steps.useful_flops(ready.shape, tokens, sum(step.responses for step in timed))
        points.append(
            {
                "rows": rows, "tokens_per_s": tokens / sum(seconds),
                "pairs_per_s": len(timed) * ready.profile.pairs_per_step / sum(seconds),
                "utilisation": useful / sum(seconds) / ready.rate, "peak_gib": device.peak_gib(ready.device),
                "step_s": seconds,
            }
        )  # fmt: skip
    return {"points": points, "matrix_tflops": ready.rate / 1e12, "dtype": ready.dtype}


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Where the last of the steps spends its time, by kind."""
    ready = Ready(job)
    cuda = ready.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    profiled = torch.profiler.profile(activities=activities, record_shapes=True)
    running = ready.steps(2 * settings.TINY_TOKENS if job["tiny"] else GOAL_ROWS)
    plain = [next(running).seconds for _step in range(TIMED)][-1]
    with profiled:
        last = next(running)
    found = shares(profiled, last.seconds, vocabulary=ready.shape.vocabulary, rank=16, cuda=cuda)
    return {"shares": found, "profiled_s": last.seconds, "step_before_s": plain}


def verdicts(results: Sequence[Result], options: Options) -> list[Verdict]:
    """Utilisation with all layers kept at rows of 4k, of each model and kind of lengths."""
    found = []
    for result in results:
        if result.status != OK:
            found.append(Verdict(f"{result.item}: measured", said(result), met_or_unknown(result, options, met=False)))
        for point in result.values.get("points", []):
            if result.item.endswith("all kept") and point["rows"] == GOAL_ROWS:
                goal = f"{result.item}, rows of {GOAL_ROWS:,}: {GOAL_UTILISATION:.0%} utilisation"
                reached = point.get("utilisation")
                text = point["error"] if reached is None else f"{reached:.1%}"
                met = reached is not None and reached >= GOAL_UTILISATION
                found.append(Verdict(goal, text, met_or_unknown(result, options, met=met)))
    return found


def table(results: Sequence[Result], records: Records) -> list[str]:
    """A line for each point, with tokens a second of the commit before beside it; then the shares."""
    lines = [f"{'':28}{'rows':>6}{'tokens/s':>10}{'before':>9}{'pairs/s':>9}{'utilisation':>13}{'peak GiB':>10}"]
    for result in results:
        earlier = records.before(result)
        if "shares" in result.values:
            continue
        if result.status != OK:
            lines.append(f"{result.item:28}  {said(result)}")
        known = {} if earlier is None else {point["rows"]: point for point in earlier.values.get("points", [])}
        for point in result.values.get("points", []):
            start = f"{result.item:28}{point['rows']:6,}"
            if "error" in point:
                lines.append(f"{start}  out of memory")
                continue
            before = known.get(point["rows"], {}).get("tokens_per_s")
            lines.append(
                f"{start}{point['tokens_per_s']:10,.0f}{'' if before is None else f'{before:,.0f}':>9}"
                f"{point['pairs_per_s']:9.2f}{point['utilisation']:13.1%}{point['peak_gib']:10.2f}"
            )
    for result in results:
        if "shares" in result.values:
            earlier = records.before(result)
            before = {} if earlier is None else earlier.values.get("shares", {})
            parts = [
                f"{kind} {share:.1%}" + (f" (before {before[kind]:.1%})" if kind in before else "")
                for kind, share in result.values["shares"].items()
            ]
            lines += [f"{result.item}, {result.values['profiled_s']:.2f} s:", "  " + "  ".join(parts)]
    return lines
