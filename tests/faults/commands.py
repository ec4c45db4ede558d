"""Odd input to the verbs other than `run`: their options, the files they are given, and damaged files of a run."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.base import DONE, REFUSED, Case, Good

KIND = "commands"
Make = Callable[[Path], list[str]]
VERBS = {
    "eval": ["eval", "runs/run", "model.device=cpu"],
    "compare": ["compare", "runs/run", "model.device=cpu", "--n", "1", "--max-new-tokens", "2"],
    "chat": ["chat", "runs/run", "model.device=cpu", "--max-new-tokens", "2"],
    "merge": ["merge", "runs/run"],
    "export to peft": ["export", "runs/run", "--to", "peft"],
    "export to gguf-adapter": ["export", "runs/run", "--to", "gguf-adapter"],
    "push": ["push", "runs/run", "someone/something", "--yes"],
    "report": ["report", "runs/run"],
    "runs": ["runs", "runs"],
    "sample": ["sample", "questions.txt", "--adapter", "runs/run", "--n", "2", "--max-new-tokens", "2", "--limit", "1"],
}
# Of a finished run; what a verb does not read may be damaged without a word.
DAMAGED = (
    "run.json", "result.json", "config.toml", "environment.json", "metrics.jsonl", "eval_pairs.jsonl", "samples.jsonl",
    "README.md", "data_report.jsonl", "adapter/adapter_config.json", "adapter/tokenizer.json",
    "adapter/tokenizer_config.json", "adapter/chat_template.jinja", "prepared/train.safetensors",
    "prepared/held_out.safetensors",
)  # fmt: skip
WEIGHTS = "adapter/adapter_model.safetensors"
ODD_LINES = [
    "", "{", "null", "[]", "1", '"x"', "{}", '{"prompt": 1}', '{"prompt": null}', '{"prompt": ""}', '{"prompt": "\\u0000"}',
    '{"prompt": "\\ud800"}', '{"messages": []}', '{"messages": {}}', '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": 1, "content": "x"}]}', '{"messages": [{"role": "assistant", "content": "x"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', '{"prompt": "' + "x " * 5000 + '"}',
    '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", '{"prompt": ' + "9" * 5000 + "}", '{"prompt": NaN}', "\ufeff{}",
    '{"prompt": "<|im_end|>"}', '{"prompt": "x", "prompt": "y"}',
]  # fmt: skip
ODD_CANDIDATES = [
    "", "{", "null", "[]", "{}", '{"prompt": "x"}', '{"prompt": "x", "answers": []}', '{"prompt": "x", "answers": ["a"]}',
    '{"prompt": "x", "answers": "a"}', '{"prompt": "x", "answers": [1, 2]}', '{"prompt": 1, "answers": ["a", "b"]}',
    '{"prompt": "x", "answers": [null, null]}', '{"prompt": "x", "answers": [{"text": 1}, {"text": 2}]}',
    '{"prompt": "x", "answers": [{"text": "a"}, {"text": "b", "tokens": "many"}]}',
    '{"prompt": "x", "answers": [{"text": "a", "tokens": -1}, {"text": "b", "tokens": 1e400}]}',
    '{"prompt": "x", "answers": {"a": 1}}', '{"prompt": "x", "answers": ["\\ud800", "b"]}',
    '{"prompt": [], "answers": ["a", "b"]}', '{"prompt": [{"role": 1}], "answers": ["a", "b"]}',
    '{"prompt": "x", "answers": ["a", "b"], "id": []}', '{"id": {}, "prompt": "x", "answers": ["a", "b"]}',
    '{"prompt": "x", "answers": ' + "[" * 3000 + "]" * 3000 + "}", '{"prompt": "x", "chosen": 1, "rejected": []}',
    '{"prompt": "x", "answers": [{"text": "a", "cut": "yes"}, {"text": "b"}], "seed": "x"}', "\0\0\0",
]  # fmt: skip
NAMES = {
    "of 300 letters": "n" * 300, "above the folder": "../../out", "that is a folder": "base", "in a file": "pairs.jsonl/x",
    "that is a device": "/dev/full", "that cannot be made": "/proc/x/y", "that is empty": "", "with a line end": "a\nb",
    "with a control code": "a\x1b[31m", "that is no UTF-8": "a\udcff", "that is the root": "/",
}  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    yield from _damaged_runs(rng, good)
    yield from _odd_files(rng, good)
    yield from _odd_options(rng, good)


def _case(name: str, make: Make, right: frozenset[str] = REFUSED, near: str | None = None, typed: str = "") -> Case:
    return Case(KIND, name, make, right, near, typed=typed)


def _laid(good: Good, folder: Path) -> Path:
    """The finished run and what the verbs are given."""
    good.lay_run(folder, good.run)
    good.lay(folder)
    (folder / "questions.txt").write_text("tell me about river\n", encoding="utf-8")
    return folder / "runs" / "run"


def _damaged_runs(rng: random.Random, good: Good) -> Iterator[Case]:
    for number in range(60):
        verb = rng.choice(list(VERBS))
        file = rng.choice([*DAMAGED, WEIGHTS])
        how, damage = rng.choice(list(DAMAGE.items()))
        place = rng.random()

        def make(
            folder: Path, file: str = file, damage: Damage = damage, place: float = place, verb: str = verb
        ) -> list[str]:
            damage(_laid(good, folder) / file, place)
            return VERBS[verb]

        right = REFUSED if file == WEIGHTS and verb not in ("runs", "report") else REFUSED | DONE
        yield _case(f"{verb}: {file} {how} ({number})", make, right, typed="hello\n")


Damage = Callable[[Path, float], object]


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << int(place * 8 * len(content)) % 8
    path.write_bytes(content)


def _replace(path: Path, build: Callable[[Path], object]) -> None:
    path.unlink()
    build(path)


DAMAGE: dict[str, Damage] = {
    "with one bit flipped": _flip,
    "cut": lambda path, place: os.truncate(path, int(place * path.stat().st_size)),
    "empty": lambda path, place: os.truncate(path, 0),
    "missing": lambda path, place: path.unlink(),
    "made a folder": lambda path, place: _replace(path, lambda new: new.mkdir()),
    "made a link to nothing": lambda path, place: _replace(path, lambda new: new.symlink_to("nowhere")),
    "made a link to itself": lambda path, place: _replace(path, lambda new: new.symlink_to(new.name)),
    "made a list": lambda path, place: path.write_text("[]\n"),
    "made a number": lambda path, place: path.write_text("1\n"),
    "made an empty object": lambda path, place: path.write_text("{}\n"),
    "made deep": lambda path, place: path.write_text("[" * 50_000),
    "made NUL bytes": lambda path, place: path.write_bytes(bytes(path.stat().st_size)),
    "made a named pipe": lambda path, place: _replace(path, os.mkfifo),
    "followed by a line of nothing": lambda path, place: path.write_bytes(path.read_bytes() + b"\0\n"),
}


def _odd_files(rng: random.Random, good: Good) -> Iterator[Case]:
    """Files of prompts and of candidates."""

    def prompts(name: str, verb: list[str], file: str, content: bytes) -> Case:
        def make(folder: Path) -> list[str]:
            _laid(good, folder)
            (folder / file).write_bytes(content)
            return verb

        return _case(name, make, REFUSED | DONE)

    tail = ["--max-new-tokens", "2"]
    model = [word for word in good.words() if word.startswith(("model.", "cache.dir"))]
    for number in range(24):
        line = rng.choice(ODD_LINES)
        whole = line.encode("utf-8", "surrogatepass") + b"\n" + b'{"prompt": "tell me"}\n' * rng.randrange(2)
        readers = {
            "compare": ["compare", "runs/run", "model.device=cpu", "--prompts", "odd.jsonl", *tail],
            "sample": ["sample", "odd.jsonl", *model, "--n", "2", *tail],
            "run": ["run", *good.words(samples__prompts="odd.jsonl", output__name="new")],
            "text": ["compare", "runs/run", "model.device=cpu", "--prompts", "odd.txt", *tail],
        }
        reader = rng.choice(list(readers))
        shown = line if len(line) < 60 else f"{line[:20]}… of {len(line)}"
        file = "odd.txt" if reader == "text" else "odd.jsonl"
        yield prompts(f"prompts for {reader}: {ascii(shown)} ({number})", readers[reader], file, whole)
    for number in range(24):
        line = rng.choice(ODD_CANDIDATES)
        by = rng.choice(["length", "regex:a", "length:longer"])
        shown = line if len(line) < 60 else f"{line[:20]}… of {len(line)}"
        words = ["judge", "odd.jsonl", "--by", by, "--out", "judged.jsonl"]
        yield prompts(f"candidates for judge: {ascii(shown)} ({number})", words, "odd.jsonl", line.encode() + b"\n")
    for number in range(8):
        line = rng.choice([*ODD_CANDIDATES, '{"item": 1}', '{"choice": "x"}', '{"version": 99}'])

        def journal(folder: Path, line: str = line) -> list[str]:
            candidates = {"prompt": "x", "answers": [{"text": "a"}, {"text": "b b"}]}
            (folder / "c.jsonl").write_text(json.dumps(candidates) + "\n")
            (folder / "judged.jsonl").write_text(line + "\n")
            for name in ("judged.decisions.jsonl", "judged.jsonl.decisions", ".judged.decisions.jsonl"):
                (folder / name).write_text(line + "\n")
            return ["judge", "c.jsonl", "--by", "length", "--out", "judged.jsonl"]

        shown = line if len(line) < 60 else f"{line[:20]}… of {len(line)}"
        yield _case(f"decisions that hold {ascii(shown)} ({number})", journal, REFUSED | DONE)
    for what, build in PLACES.items():
        for verb in ("compare", "sample", "judge", "rubric", "check"):
            yield _case(f"{what} given to {verb}", lambda folder, v=verb, b=build: _placed(good, folder, v, b))


PLACES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a named pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a file of NUL bytes": lambda path: path.write_bytes(bytes(4096)),
    "a file in UTF-16": lambda path: path.write_text("hello", encoding="utf-16"),
}


def _placed(good: Good, folder: Path, verb: str, build: Callable[[Path], object]) -> list[str]:
    _laid(good, folder)
    build(folder / "odd.jsonl")
    model = [word for word in good.words() if word.startswith(("model.", "cache.dir"))]
    (folder / "c.jsonl").write_text('{"prompt": "x", "answers": [{"text": "a"}, {"text": "b b"}]}\n')
    return {
        "compare": ["compare", "runs/run", "model.device=cpu", "--prompts", "odd.jsonl", "--max-new-tokens", "2"],
        "sample": ["sample", "odd.jsonl", *model, "--n", "2", "--max-new-tokens", "2"],
        "judge": ["judge", "odd.jsonl", "--by", "length", "--out", "judged.jsonl"],
        "rubric": ["judge", "c.jsonl", "--by", "openai:http://127.0.0.1:9/v1", "--judge-model", "m", "--rubric",
                   "odd.jsonl", "--out", "judged.jsonl"],
        "check": ["data", "check", "odd.jsonl", "model.path=base"],
    }[verb]  # fmt: skip


def _odd_options(rng: random.Random, good: Good) -> Iterator[Case]:
    def laid(*words: str) -> Make:
        def make(folder: Path) -> list[str]:
            _laid(good, folder)
            (folder / "c.jsonl").write_text('{"prompt": "x", "answers": [{"text": "a"}, {"text": "b b"}]}\n')
            return list(words)

        return make

    for what, name in NAMES.items():
        yield _case(f"merge into a folder {what}", laid("merge", "runs/run", name), REFUSED | DONE)
        yield _case(f"export into a folder {what}", laid("export", "runs/run", name, "--to", "peft"), REFUSED | DONE)
        yield _case(f"report into a file {what}", laid("report", "runs/run", "--out", name), REFUSED | DONE)
        yield _case(f"runs of a folder {what}", laid("runs", name), REFUSED | DONE)
        yield _case(f"eval of a run {what}", laid("eval", name))
        yield _case(f"cache ls of a folder {what}", laid("cache", "ls", "--dir", name), REFUSED | DONE)
        yield _case(f"convert into a file {what}", laid("data", "convert", "pairs.jsonl", name), REFUSED | DONE)
        yield _case(f"split into a folder {what}", laid("data", "split", "pairs.jsonl", name), REFUSED | DONE)
        yield _case(
            f"check with a report {what}",
            laid("data", "check", "pairs.jsonl", "model.path=base", "--report", name),
            REFUSED | DONE,
        )
        yield _case(
            f"judge into a file {what}", laid("judge", "c.jsonl", "--by", "length", "--out", name), REFUSED | DONE
        )
        yield _case(f"push to a repository {what}", laid("push", "runs/run", name, "--yes"))
        yield _case(f"a preset {what}", laid("presets", name))
        yield _case(f"a metric {what}", laid("metrics", name), REFUSED | DONE)
    for value in ("nan", "inf", "-inf", "-1", "0", "1e400", "1e308", "1e-320", "9" * 400, "x", ""):
        for words in (
            ["plan", "model.path=base", "--gpu-gib", value], ["plan", "preset=7b-24gb", "--others-gib", value],
            ["fit", "--gpu-gib", value], ["fit", "--gpu-gib", "8", "--longest", value],
            ["fit", "--gpu-gib", "8", "--mean", value], ["data", "show", "pairs.jsonl", "--row", value],
            ["bench", *good.words(), "--limit-gib", value, "--steps", "1", "--longest", "64"],
            ["bench", *good.words(), "--steps", value, "--longest", "64"],
            ["compare", "runs/run", "model.device=cpu", "--temperature", value, "--n", "1", "--max-new-tokens", "2"],
            ["compare", "runs/run", "model.device=cpu", "--seed", value, "--temperature", "1", "--n", "1", "--max-new-tokens", "2"],
            ["chat", "runs/run", "model.device=cpu", "--top-p", value, "--max-new-tokens", "2"],
            ["judge", "c.jsonl", "--by", "length", "--margin", value, "--out", "judged.jsonl"],
            ["judge", "c.jsonl", "--by", "openai:http://127.0.0.1:9/v1", "--judge-model", "m", "--timeout", value, "--out", "o.jsonl"],
            ["data", "split", "pairs.jsonl", "out", "--fraction", value], ["data", "split", "pairs.jsonl", "out", "--seed", value],
            ["sweep", *good.words(), f"loss.beta=0.1,{value}"],
        ):  # fmt: skip
            said = " ".join(word for word in words if "=" not in word)
            shown = said if len(said) < 70 else said[:60] + "…"
            yield _case(
                f"{shown}" + (f" {value[:5]}" if "…" in shown else ""), laid(*words), REFUSED | DONE, typed="hello\n"
            )
    for by in ("", "length:", "length:x", "regex:", "regex:(", "regex:(a+)+$", "regex:!", "reward-model:", "reward-model:base",
               "reward-model:/dev/null", "openai:", "openai:x", "openai:http://", "openai:http://[", "openai:ftp://x",
               "openai:http://127.0.0.1:99999/v1", "openai:http://127.0.0.1:9", "openai:http://\x00", "openai:http://a b/", "é"):  # fmt: skip
        yield _case(
            f"judge by {ascii(by)}",
            laid("judge", "c.jsonl", "--by", by, "--judge-model", "m", "--out", "o.jsonl"),
            REFUSED | DONE,
        )
    for quant in ("", "q4_0", "F16", "\x00", "é"):
        yield _case(f"export of type {ascii(quant)}", laid("export", "runs/run", "--to", "gguf", "--quant", quant))
    for name in ("", "a b", "../x", "x\ny", '"', "é", "x" * 300, "{{", "\x1b[31m"):
        for target in ("ollama", "vllm"):
            yield _case(
                f"export to {target} named {ascii(name)[:20]}",
                laid("export", "runs/run", "--to", target, "--lora", "--name", name),
                REFUSED | DONE,
            )
