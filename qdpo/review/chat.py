"""`qdpo chat`: two streamed answers to each message; commands begin with a slash."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import IO, Any

from qdpo.data.layouts.pair import Message
from qdpo.data.tokens.prompts_only import Prompt, encode_prompts
from qdpo.errors import DataError
from qdpo.model.generate.generate import stream
from qdpo.model.policy.adapter import Policy
from qdpo.settings.schema import DataConfig

SIDES = ("base", "tuned")
HELP = (
    "/both, /base, /tuned: choose who answers · /reset: forget the conversation · /system TEXT: set the system message "
    "(and reset) · /quit. Ctrl-C stops an answer; pressed twice, it quits."
)


@dataclass(kw_only=True)
class Chat:
    """Two conversations with one policy, with the adapter off and on. Each keeps its own answers."""

    policy: Policy
    tokenizer: Any
    data: DataConfig
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    asked: tuple[str, ...] = SIDES
    """The sides that answer."""
    system: str | None = None
    said: dict[str, list[Message]] = field(default_factory=lambda: {side: [] for side in SIDES})
    turns: int = 0

    def command(self, line: str) -> str | None:
        """Run a slash command; return a line for the user, or None for /quit."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return None
        if name in ("/base", "/tuned", "/both"):
            self.asked = SIDES if name == "/both" else (name[1:],)
            return f"{' and '.join(self.asked)} answer{'' if name == '/both' else 's'}"
        if name in ("/reset", "/system"):
            if name == "/system":
                self.system = rest.strip() or None
            self.said = {side: [] for side in SIDES}
            return "new conversation" + (f", system message: {self.system}" if self.system else "")
        return HELP if name == "/help" else f"unknown command {name}. {HELP}"

    def answer(self, side: str, question: str, write: Callable[[str], None]) -> None:
        """Write one side's answer, piece by piece; it stays in the conversation even if it is interrupted.

        Raises: DataError if the chat template refuses the conversation, which then stays unchanged.
        """
        turns = [*self.said[side], {"role": "user", "content": question}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = Prompt([*system, *turns], bool(self.tokenizer.chat_template), "the conversation")
        (ids,) = encode_prompts([prompt], self.tokenizer, self.data)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            with self.policy.reference() if side == "base" else nullcontext():
                stream(
                    self.policy.peft, self.tokenizer, ids, take, max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature, top_p=self.top_p, seed=self.seed + self.turns,
                )  # fmt: skip
        finally:
            if text := "".join(pieces).strip():
                self.said[side] = [*turns, {"role": "assistant", "content": text}]


def talk(chat: Chat, source: IO[str], out: IO[str]) -> None:
    """Read messages until /quit or the end of `source`, and write the answers to `out`.

    Ctrl-C stops the answers to a message; a second Ctrl-C before the next message quits with KeyboardInterrupt.
    """
    live = source.isatty() and out.isatty()

    def write(text: str) -> None:
        out.write(_plain(text))
        out.flush()

    if live:
        write(HELP + "\n")
    was_stopped = False
    while True:
        try:
            line = input("\n> ") if live else source.readline()
            if not (line or live):
                return
            was_stopped = False
            if not line.strip():
                continue
            if line.startswith("/"):
                told = chat.command(line.strip())
                if told is None:
                    return
                write(told + "\n")
            else:
                _turn(chat, line.strip(), write)
        except EOFError:
            return
        except KeyboardInterrupt:
            if was_stopped:
                raise
            was_stopped = True
            write("\n(stopped; Ctrl-C again quits)\n")


def _turn(chat: Chat, question: str, write: Callable[[str], None]) -> None:
    for side in chat.asked:
        write(f"{side}: ")
        try:
            chat.answer(side, question, write)
        except DataError as error:
            write(str(error))
        write("\n")
    chat.turns += 1


def _plain(text: str) -> str:
    """The text without control characters, with which an answer could control the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
