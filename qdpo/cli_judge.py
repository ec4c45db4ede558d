"""The verb that fills in preferences by a rule or a model: judge. `cli` registers it."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import quiet_libraries
from qdpo.errors import ServerError


def judge(
    candidates: Annotated[list[Path], typer.Argument(metavar="CANDIDATES.jsonl…", help="What `qdpo sample` wrote.")],
    by: Annotated[
        str, typer.Option(help="length[:longer], regex:PATTERN, reward-model:PATH or openai:URL; see above.")
    ],
    out: Annotated[Path, typer.Option(help="The pairs, PAIRS.jsonl; the same file that `qdpo label` goes on with.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Decide about this many prompts at most.")] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Smaller differences are left open. Share of the length, default 0.1; of rewards, default 0."
        ),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Reward model: nf4 (default), fp4 or none.")] = None,
    device: Annotated[str | None, typer.Option(help="Reward model: auto (default), cuda or cpu.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Server: the model's name there.")] = None,
    rubric: Annotated[Path | None, typer.Option(help="Server: a text that says what makes an answer better.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, max=64, help="Server: prompts at a time. Default: 4.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Server: longest wait for one reply, in seconds. Default: 120.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Server: longest reply, thoughts counted. Default: 2048.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False,
) -> None:
    """Decide by a rule or a model which answers are better; what it cannot tell is left to a person (`qdpo label`).

    Decisions that exist are kept, and each new one is on disk at once: the same command goes on where it was stopped.

    length: the shorter answer wins (length:longer: the longer), in tokens or else in characters; an answer that was cut
    at the length limit loses; all cut, or lengths closer than --margin: left open.

    regex:PATTERN: an answer in which the pattern is found beats one in which it is not (regex:!PATTERN: the other way).

    reward-model:PATH: a folder or hub id of a classifier with one label; the highest reward beats the lowest.

    openai:URL: a chat model on any OpenAI-compatible server compares two answers at a time, in both orders; only where
    both agree it counts. Best and worst of n answers take about 1.5 n comparisons. The key is read from QDPO_JUDGE_KEY,
    or for OpenAI itself from OPENAI_API_KEY. An answer may try to talk its judge into liking it: look at samples.

    Example: qdpo judge candidates.jsonl --by length --out pairs.jsonl

    Example: qdpo judge candidates.jsonl --by openai:http://localhost:8000/v1 --judge-model NAME --out pairs.jsonl
    """
    quiet_libraries()
    from qdpo.collect.candidates import read_candidates
    from qdpo.collect.decisions import opened
    from qdpo.collect.judge import judge_candidates, summary_lines
    from qdpo.collect.judges import Options, make_judge
    from qdpo.report.terminal import Terminal

    terminal = Terminal(stderr=json_)
    collected = read_candidates(candidates)
    for note in collected.notes:
        terminal.say(note)
    options = Options(
        margin=margin, quantization=quantization, device=device, judge_model=judge_model, rubric=rubric,
        parallel=parallel, timeout=timeout, max_tokens=max_tokens,
    )  # fmt: skip
    with opened(out, collected.items) as decisions:
        made = make_judge(by, options, collected.items, terminal.say)
        try:
            found = judge_candidates(made, decisions, collected.items, terminal, limit=limit)
        except KeyboardInterrupt:  # typer would exit without a word
            pairs = sum(1 for _pair in decisions.pairs())
            terminal.say(f"stopped: {pairs:,} pairs lie in {out}, and the same command goes on")
            raise typer.Exit(130) from None
    if json_:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        for line in summary_lines(found, made, shlex.join(map(str, candidates))):
            terminal.say(line)
    if found.unanswered:
        raise ServerError(
            f"{found.unanswered.total():,} prompts got no answer. The same command asks about them again."
        )
