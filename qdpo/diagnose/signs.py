"""The conditions of the rules: functions over the records that return the evidence with its bound, or None."""

import math
import statistics
from collections.abc import Iterator

from qdpo.diagnose.course import Course, mean

# Number of steps without any effect after which the rule holds.
UNMOVED_STEPS = 10
# Nats a token. After a loss of half a nat, each token of a chosen answer keeps 61 % of its probability.
DISPLACED = 0.5
# Nats a token between chosen and rejected. With 46 tokens an answer and beta 0.1, the demo wrote readable answers at a
# margin of 3.1 (0.7 nats a token), and repetitions at 7.7 (1.7 nats a token); see report/screen/metrics.md.
RUNAWAY = 1.2
# The proxy `kl`, nats a token. It was 1.4 at the end of a healthy demo, and 10^6 at a hundred times its learning rate.
DRIFTED = 10.0
# Below this margin, a sigmoid loss still pulls with 95 % of its initial strength.
WEAK_MARGIN, SORTED = 0.1, 0.9
SATURATED, EARLY_SHARE = 0.99, 0.1
SPIKE, SPIKES, SPIKE_STEPS = 10.0, 3, 100
LONGER, SHORTER = 1.5, 0.5
REPEATING, REPEATING_MORE = 0.4, 0.25
# Maximum number of windows for means over much of the run, so that a check costs the same however long the run is.
MANY_WINDOWS = 20


def unmoved(course: Course) -> str | None:
    opening = course.steps[:UNMOVED_STEPS]
    if len(opening) == UNMOVED_STEPS and all(record["rewards/margins"] == 0.0 for record in opening):
        rate = max(record["learning_rate"] for record in opening)
        return f"after {UNMOVED_STEPS} steps every margin is still exactly 0 (learning_rate up to {rate:g})"
    return None


def swapped(course: Course) -> str | None:
    for share, pairs, whose in _accuracies(course):
        bound = course.first_accuracy - 3 * course.noise(pairs)
        if share < bound:
            counted = f"only {share:.0%} of {pairs:,.0f} {whose} pairs are ordered as labelled"
            return f"{counted}, below chance (bound: {bound:.0%})"
    return None


def stuck(course: Course) -> str | None:
    found = [
        known for known in _accuracies(course)
        if (known[2] != "held-out" or _is_late(course)) and _by_chance(course, known[1]) <= 1
    ]  # fmt: skip
    if not course.half_done or not found or _train_accuracy(course) >= 0.75 or runaway(course):
        return None
    share, pairs, whose = found[0]
    bound = _by_chance(course, pairs)
    if not course.first_accuracy - 3 * course.noise(pairs) <= share < bound:
        return None
    counted = f"{share:.0%} of {pairs:,.0f} {whose} pairs are ordered as labelled"
    return f"{counted}, no more than chance allows (up to {bound:.0%})"


def _by_chance(course: Course, pairs: float) -> float:
    """The highest accuracy that chance explains. Above 1, there are too few pairs to say anything."""
    return course.first_accuracy + 2 * course.noise(pairs)


def overfit(course: Course) -> str | None:
    latest = course.latest
    if latest is None or course.recent("loss") is None or swapped(course):
        return None
    share, bound = latest["eval_rewards/accuracies"], _by_chance(course, course.terms.held_out)
    if course.half_done and share < bound <= 1 and _train_accuracy(course) >= 0.9:
        return (
            f"{_train_accuracy(course):.0%} of the training pairs are ordered as labelled, but only {share:.0%} of the "
            f"{course.terms.held_out:,} held-out ones, no more than chance allows (up to {bound:.0%})"
        )
    best = min(course.evaluations, key=lambda record: float(record["eval_loss"]))
    start = float(course.evaluations[0]["eval_loss"])
    rise, bound = latest["eval_loss"] - best["eval_loss"], max(0.02 * abs(start), 0.25 * (start - best["eval_loss"]))
    place = max(int(best["step"]), course.window)  # records of steps have no gaps, so step n is the n-th
    then = course.steps[place - course.window : place]
    if rise > bound and mean(course.steps[-course.window :], "loss") < mean(then, "loss"):
        return (
            f"held-out loss has risen from {best['eval_loss']:.3f} after step {best['step']} to "
            f"{latest['eval_loss']:.3f} (bound: +{bound:.3f}) while the training loss fell"
        )
    return None


def saturated(course: Course) -> str | None:
    early = int(max(course.window, EARLY_SHARE * course.terms.steps))
    shares = [record["rewards/accuracies"] for record in course.steps[:early]]
    for end in range(course.window, len(shares) + 1):
        if sum(shares[end - course.window : end]) / course.window >= SATURATED:
            step = course.steps[end - 1]["step"]
            return f"accuracy was already {SATURATED:.0%} or more by step {step} of {course.terms.steps}"
    first, latest = course.first, course.latest
    if first and latest and latest["eval_rewards/accuracies"] >= 0.995:
        if 0 < first["eval_loss"] and latest["eval_loss"] < 0.1 * first["eval_loss"]:
            return (
                f"all {course.terms.held_out:,} held-out pairs are ordered as labelled and their loss is "
                f"{latest['eval_loss']:.4f}, under a tenth of the {first['eval_loss']:.4f} at the start: better than "
                "real preferences allow"
            )
    return None


def displacement(course: Course) -> str | None:
    falls = []
    if course.first and course.latest:
        name = "eval_logps/chosen_per_token"
        falls.append((course.latest[name] - course.first[name], "held-out"))
    recent = course.steps[-course.window :]
    if len(recent) == course.window and all("kl" in record for record in recent):
        nats = mean(recent, "rewards/chosen") / course.terms.beta
        falls.append((nats / mean(recent, "lengths/chosen"), "recent training"))
    fall, whose = min(falls, default=(0.0, ""))
    if fall >= -DISPLACED:
        return None
    kept = math.exp(max(fall, -20))
    return (
        f"chosen answers of {whose} pairs have lost {-fall:.2f} nats a token (bound: {DISPLACED:g}): each token keeps "
        f"{kept:.0%} of its probability"
    )


def runaway(course: Course) -> str | None:
    gaps = []
    recent = course.steps[-course.window :]
    for whose, records, prefix in (("held-out", [course.latest], "eval_"), ("recent training", recent, "")):
        known = [record for record in records if record and f"{prefix}kl" in record]
        if known and (prefix or len(known) == course.window):
            tokens = (mean(known, f"{prefix}lengths/chosen") + mean(known, f"{prefix}lengths/rejected")) / 2
            gaps.append((mean(known, f"{prefix}rewards/margins") / course.terms.beta / tokens, whose))
    gap, whose = max(gaps, default=(0.0, ""))
    if gap <= RUNAWAY:
        return None
    return f"the two answers of {whose} pairs are {gap:.2f} nats a token apart (bound: {RUNAWAY:g})"


def weak_beta(course: Course) -> str | None:
    recent = course.steps[-course.window :]
    if not course.half_done or any("kl" not in record for record in recent):
        return None
    share, margin = _train_accuracy(course), mean(recent, "rewards/margins")
    if share < SORTED or not 0 < margin < WEAK_MARGIN:
        return None
    return (
        f"{share:.0%} of recent training pairs are ordered as labelled, {margin / course.terms.beta:.1f} nats apart, "
        f"but at beta {course.terms.beta:g} that is a margin of {margin:.3g} (bound: {WEAK_MARGIN:g}), which hardly "
        "lowers the loss"
    )


def drift(course: Course) -> str | None:
    recent = [record["kl"] for record in course.steps[-course.window :] if "kl" in record]
    values = [(statistics.median(recent), "of recent steps")] if len(recent) == course.window else []
    if course.latest and "eval_kl" in course.latest:
        values.append((course.latest["eval_kl"], "of the held-out pairs"))
    value, whose = max(values, default=(0.0, ""))
    return f"the proxy kl {whose} is {value:.3g} nats a token (bound: {DRIFTED:g})" if value > DRIFTED else None


def repetition(course: Course) -> str | None:
    before, after = _sampled(course, "eval_samples/repetition")
    if after is None or before is None or after < REPEATING or after - before < REPEATING_MORE:
        return None
    return (
        f"{after:.0%} of a sampled answer repeats earlier parts of it, {before:.0%} with the adapter off (bounds: "
        f"{REPEATING:.0%}, and {REPEATING_MORE:.0%} more than with the adapter off)"
    )


def length(course: Course) -> str | None:
    before, after = _sampled(course, "eval_samples/tokens")
    if not before or after is None or course.latest is None:
        return None
    chosen, rejected = (course.latest[f"eval_lengths/{side}"] for side in ("chosen", "rejected"))
    beside = f"chosen answers have {chosen:.0f} tokens, rejected ones {rejected:.0f}"
    if after > LONGER * before and after > chosen:
        return f"sampled answers grew from {before:g} to {after:g} tokens (bound: {LONGER:g} times; {beside})"
    if after < SHORTER * before and after < SHORTER * chosen:
        return f"sampled answers shrank from {before:g} to {after:g} tokens (bound: {SHORTER:g} times; {beside})"
    return None


def spikes(course: Course) -> str | None:
    norms = [record["grad_norm"] for record in course.steps[-SPIKE_STEPS:] if "grad_norm" in record]
    peaks = []
    for place in range(course.window, len(norms)):
        usual = statistics.median(norms[max(0, place - 2 * course.window) : place])
        if usual > 0 and norms[place] > SPIKE * usual:
            peaks.append(norms[place] / usual)
    if len(peaks) < SPIKES and max(peaks, default=0) < SPIKE**2:
        return None
    return (
        f"{len(peaks)} of the last {len(norms)} gradients were more than {SPIKE:g} times those before, the largest "
        f"{max(peaks):.0f} times"
    )


def overflow(course: Course) -> str | None:
    recent = course.steps[-20:]
    risen = recent[-1].get("overflows", 0) - recent[0].get("overflows", 0) if len(recent) == 20 else 0
    return f"{risen} of the last 20 updates were skipped because fp16 overflowed (bound: 5)" if risen > 5 else None


def _accuracies(course: Course) -> Iterator[tuple[float, float, str]]:
    """Share of pairs ordered as labelled, number of pairs, and which pairs; held-out pairs first."""
    if course.latest and len(course.steps) >= course.window:
        yield course.latest["eval_rewards/accuracies"], course.terms.held_out, "held-out"
    steps = max(course.window, min(len(course.steps) // 3, MANY_WINDOWS * course.window))
    share = course.recent("rewards/accuracies", steps)
    if share is not None and course.half_done:
        yield share, steps * course.terms.pairs_per_step, "recent training"


def _is_late(course: Course) -> bool:
    return course.latest is not None and course.latest["step"] >= course.terms.steps / 2


def _train_accuracy(course: Course) -> float:
    return course.recent("rewards/accuracies") or 0.0


def _sampled(course: Course, name: str) -> tuple[float | None, float | None]:
    """A metric of the sampled answers with the adapter off, and now."""
    return (course.first or {}).get(name), (course.latest or {}).get(name)
