"""The tokenizer of a run: the base's, with the chat template and the end of answers that the run trains.

A run begins with the base's tokenizer, or what adapter.start brings; its adapter/ folder keeps what was trained, and
all that generates text or ships a model reads it there.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qdpo.data import stored
from qdpo.data.tokens.ends import ends_of_pairs, ends_of_template
from qdpo.data.tokens.shipped import PLAIN_ANSWER, plain_template, shipped_template
from qdpo.data.tokens.store import TokenPair
from qdpo.data.tokens.templates import settle_template
from qdpo.errors import ConfigError
from qdpo.model.base import tokenizer_files
from qdpo.model.base.load import load_tokenizer
from qdpo.model.base.tokenizer_files import Template
from qdpo.run.finished import FinishedRun
from qdpo.run.folder import RunDir
from qdpo.run.record import RunRecord
from qdpo.run.watcher import Say
from qdpo.settings.schema import DataConfig

LOOKED_AT = 64
"""Prompts that are read to tell conversations from bare text."""


@dataclass(frozen=True)
class Ends:
    """The tokens at which a model's answers end, by id: those that the run trained; every one, the base's first."""

    trained: Sequence[int]
    every: Sequence[int]


NO_ENDS = Ends((), ())


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer with the template that is shipped, and the ends of answers."""

    tokenizer: Any
    ends: Ends

    @property
    def template(self) -> Template | None:
        found: Template | None = self.tokenizer.chat_template
        return found or None


def take_start(tokenizer: Any, start: str | None, template: str, say: Say) -> None:
    """Gives the base's tokenizer the chat template and the end token that adapter.start brings; says so.

    A data.template that was given is used instead. Raises: ConfigError if the folder's tokenizer has other tokens.
    """
    if start is None or not tokenizer_files.has_tokenizer(folder := Path(start).expanduser()):
        return
    brought = tokenizer_files.read_tokenizer_files(folder)
    _check_vocabulary(tokenizer, folder, given=template if template != "auto" else None, say=say)
    own = tokenizer.chat_template or None
    if template != "auto":
        if brought.template is not None and brought.template != own:
            say(f"data.template={template} replaces the chat template that adapter.start={start} was saved with")
        return
    if brought.template is not None and brought.template != own:
        tokenizer.chat_template = brought.template
        place = "in the place of the base's" if own else "the base has none"
        say(f"chat template: the one that adapter.start={start} was saved with ({place})")
    elif brought.template is None and own is not None:
        say(f"warning: adapter.start={start} was saved with a tokenizer without chat template; the base's is used")
    if brought.eos is not None and brought.eos != tokenizer.eos_token:
        say(f"end token: {brought.eos}, as saved with adapter.start={start} (the base's is {tokenizer.eos_token})")
        tokenizer.eos_token = brought.eos


def check_no_new_files(run: RunDir, record: RunRecord) -> None:
    """Refuses a file that a local base's tokenizer reads now and that was not there when the run began.

    The pairs are prepared, so samples and the saved adapter would have another template or vocabulary than they.
    Raises: ConfigError.
    """
    folder = Path(record.base.folder)
    if record.base.commit is not None:
        return
    recorded_all = record.data.ends is not None  # 0.1 recorded the files directly in the folder alone
    for path in tokenizer_files.tokenizer_files(folder):
        if (recorded_all or path.parent == folder) and str(path.absolute()) not in record.files:
            raise ConfigError(
                f"{path} is new since the run {run.path} was started, and the tokenizer reads it. Take it away to go "
                "on, or train again with `--fresh`."
            )


def _check_vocabulary(tokenizer: Any, folder: Path, *, given: str | None, say: Say) -> None:
    known = tokenizer.get_vocab()
    theirs = tokenizer_files.vocabulary_of(folder)
    moved = [word for word, place in theirs.items() if known.get(word, place) != place]
    if moved:
        word = min(moved, key=lambda one: theirs[one])
        raise ConfigError(
            f"adapter.start={folder} was saved with another tokenizer than the base's: {len(moved)} tokens have other "
            f"ids, such as {word!r} ({theirs[word]}, here {known[word]}). Give the base that it was trained on as "
            "model.path."
        )
    eos = tokenizer_files.read_tokenizer_files(folder).eos
    added = sorted(word for word in {*theirs, eos or ""} - {""} if word not in known)
    if not added:
        return
    what = f"{len(added)} tokens that the base's tokenizer lacks, such as {added[0]!r}"
    told = f"adapter.start={folder} was saved with {what}"
    if given is None:
        raise ConfigError(
            f"{told}. This base has no embeddings for them. Give the base that the adapter was trained on as "
            "model.path, or a data.template (chatml, plain, a file) to train with the base's own tokenizer."
        )
    say(f"warning: {told}; data.template={given} is rendered with the base's own tokenizer")


def trained_ends(run: RunDir, record: RunRecord, tokenizer: Any, data: DataConfig) -> list[int]:
    """The special tokens with which the run's answers end: as recorded, else as its prepared pairs show."""
    ends = record.data.ends
    if ends is None and run.train_pairs.is_file():
        ends = ends_of_pairs(stored.load(run)[0], tokenizer, max_tokens=data.max_tokens)
    if ends is None:
        ends = ends_of_template(tokenizer, data.template, data.template_options)
    return [token for token in ends if 0 <= token < len(tokenizer)]


def start_ends(tokenizer: Any, start: str | None, data: DataConfig) -> list[int]:
    """The tokens at which answers end before a run: that of the template, and those stated with adapter.start."""
    stated = [] if start is None else tokenizer_files.stated_ends(Path(start).expanduser())
    ends = [*ends_of_template(tokenizer, data.template, data.template_options), *stated]
    return [token for token in dict.fromkeys(ends) if 0 <= token < len(tokenizer)]


def save_tokenizer(tokenizer: Any, folder: Path, run: RunDir, record: RunRecord, data: DataConfig, base: Path) -> None:
    """Writes the tokenizer as trained into an adapter folder.

    Where the base does not state the trained ends, a generation_config.json there does.
    """
    trained = trained_ends(run, record, tokenizer, data)
    ends = _with_base(trained, tokenizer, base)
    shipped = copy.deepcopy(tokenizer)
    _as_trained(shipped, data, trained, run)
    shipped.save_pretrained(folder)
    if not set(trained) <= set(tokenizer_files.stated_ends(base)):
        tokenizer_files.write_ends(folder, ends, base=base)


def tokenizer_of(finished: FinishedRun, folder: Path) -> RunTokenizer:
    """A finished run's tokenizer over the vocabulary in `folder`, the base's or a merged model's.

    Template and end token are those in the run's adapter/; a run of an earlier version kept only the template there.
    Raises: ConfigError if a file cannot be read.
    """
    run, record, data = finished.run, finished.record, finished.config().data
    tokenizer = load_tokenizer(folder)
    own = _with_base([], tokenizer, folder)
    kept = tokenizer_files.has_tokenizer(run.adapter)
    if kept:
        files = tokenizer_files.read_tokenizer_files(run.adapter)
        tokenizer.chat_template = files.template
        if files.eos is not None and files.eos in tokenizer.get_vocab():
            tokenizer.eos_token = files.eos
    else:
        settle_template(tokenizer, data.template)
    trained = trained_ends(run, record, tokenizer, data)
    if not kept or record.data.ends is None:
        _as_trained(tokenizer, data, trained, run)
    return RunTokenizer(tokenizer, Ends(trained, list(dict.fromkeys([*own, *trained]))))


def tokenizer_in(folder: Path) -> RunTokenizer:
    """The tokenizer of a model's folder, with the ends that its files state."""
    tokenizer = load_tokenizer(folder)
    return RunTokenizer(tokenizer, Ends((), _with_base([], tokenizer, folder)))


def shipped_otherwise(found: RunTokenizer, folder: Path) -> list[str]:
    """The points in which a model's folder differs from the run: "chat template", "end token"; empty if in none."""
    there = tokenizer_in(folder)
    template = [] if there.template == found.template else ["chat template"]
    return template + ([] if set(found.ends.trained) <= set(there.ends.every) else ["end token"])


def keeps_conversation(found: RunTokenizer, folder: Path) -> bool:
    """True if the folder's chat_template.jinja and generation_config.json are the run's."""
    template, name = found.template, tokenizer_files.GENERATION
    source = template["default"] if isinstance(template, dict) else template
    same = tokenizer_files.jinja_in(folder) == source
    return same and set(found.ends.trained) <= set(tokenizer_files.stated_ends(folder, name))


def write_conversation_files(found: RunTokenizer, folder: Path, base: Path) -> None:
    """chat_template.jinja and generation_config.json as a model's folder holds them, and nothing else."""
    tokenizer_files.write_conversation(folder, template=found.template, eos=None)
    tokenizer_files.write_ends(folder, found.ends.every, base=base)


def put_conversation(found: RunTokenizer, folder: Path) -> None:
    """Writes template, end token and ends into a merged model's folder, in the place of the base's.

    Files that already say the same stay as they are.
    """
    before = tokenizer_in(folder)
    eos = found.tokenizer.eos_token
    if (before.template, before.tokenizer.eos_token) != (found.template, eos):
        tokenizer_files.write_conversation(folder, template=found.template, eos=eos)
    if not set(found.ends.trained) <= set(tokenizer_files.stated_ends(folder, "generation_config.json")):
        tokenizer_files.write_ends(folder, found.ends.every, base=folder)


def _with_base(trained: Sequence[int], tokenizer: Any, folder: Path) -> list[int]:
    own = tokenizer_files.stated_ends(folder)
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*eos, *own, *trained]))


def _as_trained(tokenizer: Any, data: DataConfig, trained: Sequence[int], run: RunDir) -> None:
    """Sets the template that is shipped; the trained end becomes eos, unless the template writes the old one."""
    if data.template == "plain":
        pairs = stored.load(run)[0] if run.train_pairs.is_file() else []
        tokenizer.chat_template = plain_template(tokenizer) if _are_conversations(pairs, tokenizer) else None
    source = tokenizer.chat_template or None
    options = data.template_options
    if isinstance(source, dict):
        tokenizer.chat_template = {name: shipped_template(one, options) for name, one in source.items()}
    elif source is not None and data.template != "plain":
        tokenizer.chat_template = shipped_template(source, options)
    if trained and tokenizer.eos_token_id not in trained and "eos_token" not in str(source):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(trained[0])


def _are_conversations(pairs: Iterable[TokenPair], tokenizer: Any) -> bool:
    """True if every prompt opens an answer as data.template=plain does for conversations."""
    tails = [str(tokenizer.decode(pair.prompt[-16:].tolist())) for pair in islice(pairs, LOOKED_AT)]
    return bool(tails) and all(tail.endswith(PLAIN_ANSWER) for tail in tails)
