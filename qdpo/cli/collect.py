"""The verbs that make pairs: sample, label, judge."""

import json
import shlex
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli.common import LARGEST_SEED, MOST_TOKENS, SettingArguments, finite, quiet_libraries
from qdpo.errors import ConfigError, ServerError

Files = Annotated[
    list[Path], typer.Argument(metavar="CANDIDATES…", help="Files with a prompt and its answers a line (.jsonl).")
]


def sample(
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="A text file with a prompt a line, or data: a file, a folder, a hub id."
        ),
    ],
    settings: SettingArguments = None,
    out: Annotated[Path, typer.Option(help="The file of candidates to write; the same command resumes it.")] = Path(
        "candidates.jsonl"
    ),
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A finished run, whose trained model answers instead of the base."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, max=9, help="Number of different answers to each prompt.")] = 4,
    temperature: Annotated[
        float,
        typer.Option(min=0.05, max=5.0, callback=finite, help="1: the model's own probabilities. Higher: bolder."),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, callback=finite, help="Draw from the most likely tokens up to this total probability."
        ),
    ] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed of the answers.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many prompts, from the start.")] = None,
    column: Annotated[str | None, typer.Option(help="The column with the prompts. Default: found by its name.")] = None,
) -> None:
    """Draw several answers to each prompt from your own model; then `qdpo label` or `qdpo judge` chooses between them.

    Each prompt is saved as soon as its answers are finished. Each answer has its own random stream, so it does not
    depend on what else is in the batch.

    Example: qdpo sample prompts.txt preset=7b-24gb --out candidates.jsonl
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out={out}: candidates are JSON lines. Give a name that ends in .jsonl.")
    quiet_libraries()
    from qdpo.collect.answering_model import base_sampler, run_sampler
    from qdpo.collect.sample import Sampled, SamplingParameters, read_prompts
    from qdpo.collect.sample import sample as sample_prompts
    from qdpo.report.screen.live import Terminal

    terminal = Terminal()
    found: Sampled
    try:
        read = read_prompts(prompts, column, limit, terminal)
        sampler = run_sampler(adapter, settings or [], terminal) if adapter else base_sampler(settings or [], terminal)
        drawing = SamplingParameters(n, temperature, top_p, max_new_tokens, seed)
        found = sample_prompts(sampler, read, out, drawing, terminal)
    finally:
        terminal.finish()
    for line in found.lines():
        typer.echo(line)
    typer.echo(f"{out}: {found.prompts:,} prompts. Next: qdpo label {shlex.quote(str(out))} --out pairs.jsonl")


def label(
    candidates: Files,
    out: Annotated[Path, typer.Option(help="The file of pairs to write; the journal of decisions is next to it.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page. 0: any free port.")] = 0,
    blind: Annotated[bool, typer.Option("--blind", help="Hide which model wrote an answer.")] = False,
    agreement: Annotated[
        bool,
        typer.Option(
            "--agreement", help="Ask about 5 % of the picks again, and report how often you agree with yourself."
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed of the order in which answers are shown.")
    ] = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
) -> None:
    """Choose between answers by keyboard on a local web page; the same command resumes where it stopped.

    Every decision is on disk before the page confirms it. Ctrl-C ends it. Candidates from several files are merged.

    Example: qdpo label candidates.jsonl --out pairs.jsonl
    """
    from qdpo.collect.candidates import read_candidates
    from qdpo.collect.decisions import opened
    from qdpo.collect.label.server import LabelServer
    from qdpo.collect.label.sitting import Labelling, LabelOptions

    found = read_candidates(candidates)
    with opened(out, found.items) as decisions:
        labelling = Labelling(decisions, LabelOptions(blind, agreement, seed))
        with LabelServer(labelling, port) as server:
            for note in found.notes:
                typer.echo(note)
            typer.echo(f"{len(found.items):,} prompts. The page, until Ctrl-C: {server.address}")
            if open_ and not webbrowser.open(server.address):
                typer.echo("No browser could be opened. Open the address yourself.")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo()
        for line in labelling.summary():
            typer.echo(line)


def judge(
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATES.jsonl…", help="Files that `qdpo sample` wrote.")
    ],
    by: Annotated[
        str, typer.Option(help="length[:longer], regex:PATTERN, reward-model:PATH or openai:URL; see above.")
    ],
    out: Annotated[
        Path, typer.Option(help="The file of pairs to write, PAIRS.jsonl; `qdpo label` can continue the same file.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Judge this many prompts at most.")] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            callback=finite,
            help="Leave smaller differences open. A share of the length, default 0.1; in rewards, default 0.",
        ),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Reward model: nf4 (default), fp4 or none.")] = None,
    device: Annotated[str | None, typer.Option(help="Reward model: auto (default), cuda or cpu.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Server: the model's name on the server.")] = None,
    rubric: Annotated[Path | None, typer.Option(help="Server: a text file that says which answer is better.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, max=64, help="Server: prompts at a time. Default: 4.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.1, callback=finite, help="Server: longest wait for one reply, in seconds. Default: 120."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_TOKENS, help="Server: longest reply, in tokens, thoughts included. Default: 2048."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the summary.")] = False,
) -> None:
    """Decide by a rule or a model which answers are better; undecided prompts are left to a person (`qdpo label`).

    Existing decisions are kept, and each new one is saved at once: the same command resumes where it stopped.

    length: the shorter answer wins (length:longer: the longer), in tokens if known, else in characters. An answer that
    was cut at the length limit loses. If all are cut, or lengths are closer than --margin, the prompt is left open.

    regex:PATTERN: an answer that contains the pattern beats one that does not (regex:!PATTERN: the other way round).

    reward-model:PATH: a folder or hub id of a classifier with one label; the highest reward beats the lowest.

    openai:URL: a chat model on any OpenAI-compatible server compares two answers at a time, in both orders; a
    comparison counts only if both orders agree. Finding the best and worst of n answers takes about 1.5 n comparisons.
    The key is read from QDPO_JUDGE_KEY, or for OpenAI itself from OPENAI_API_KEY. An answer may try to manipulate the
    judge (prompt injection), so read samples of its decisions.

    Example: qdpo judge candidates.jsonl --by length --out pairs.jsonl

    Example: qdpo judge candidates.jsonl --by openai:http://localhost:8000/v1 --judge-model NAME --out pairs.jsonl
    """
    quiet_libraries()
    from qdpo.collect.candidates import read_candidates
    from qdpo.collect.decisions import opened
    from qdpo.collect.judge.choose import JudgeOptions, make_judge
    from qdpo.collect.judge.run import judge_candidates, summary_lines
    from qdpo.report.screen.live import Terminal

    terminal = Terminal(stderr=json_)
    collected = read_candidates(candidates)
    for note in collected.notes:
        terminal.say(note)
    options = JudgeOptions(
        margin=margin, quantization=quantization, device=device, judge_model=judge_model, rubric=rubric,
        parallel=parallel, timeout=timeout, max_tokens=max_tokens,
    )  # fmt: skip
    with opened(out, collected.items) as decisions:
        made = make_judge(by, options, collected.items, terminal.say)
        try:
            found = judge_candidates(made, decisions, collected.items, terminal, limit=limit)
        except KeyboardInterrupt:  # typer would exit without a message
            pairs = sum(1 for _pair in decisions.pairs())
            terminal.say(f"stopped: {pairs:,} pairs are in {out}; the same command resumes")
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
