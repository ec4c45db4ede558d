"""Reads a cell of a row as text or as turns: message lists, ShareGPT, JSON inside a CSV cell, HH dialogues."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from qdpo.data.read.progress import is_deep

Message = dict[str, Any]
"""One turn: `role` is system, user, assistant or tool; `content` its text; tool calls as chat templates take them."""

CellKind = Literal["null", "text", "dialogue", "encoded", "turns", "other"]

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",  # ShareGPT
    "gpt": "assistant",  # ShareGPT
    "model": "assistant",  # Gemma's own name
    "prompter": "user",  # OpenAssistant
    "developer": "system",  # OpenAI's newer name
    "observation": "tool",  # ShareGPT
    "function": "tool",  # OpenAI's older name
}
SPEAKER_KEYS = ('"role"', "'role'", '"from"', "'from'")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn that hold a thought: transformers' and vLLM's, gpt-oss's and Anthropic's, OpenRouter's."""
THOUGHT_PARTS = ("thinking", "reasoning", "reasoning_content", "summary_text")
BESIDE_CONTENT = ("tool_calls", "tool_call_id", "name")
MESSAGE_KEYS = {"role", "from", "content", "value", "weight", *BESIDE_CONTENT, *THOUGHTS}
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class RowProblem(Exception):
    """The reason why a row cannot be used: a short name for counting, and a sentence for the user."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def kind_of(value: Any) -> CellKind:
    """The kind of a cell's content; `encoded` is a message list written as JSON or Python text, as in CSV files."""
    if is_null(value):
        return "null"
    if isinstance(value, str):
        if not value.strip():
            return "null"  # an empty cell of a CSV file
        if is_dialogue(value):
            return "dialogue"
        return "text" if decode_turns(value) is None else "encoded"
    value = _unwrapped(value)
    if isinstance(value, list) and not value:
        return "null"
    return "turns" if _looks_like_turns(value) else "other"


def is_dialogue(text: str) -> bool:
    """True for `Human: … Assistant: …`, a whole conversation in one string as in HH."""
    text = text.lstrip()
    return text.startswith("Human:") and "\n\nAssistant:" in text


def decode_turns(text: str) -> Any | None:
    """Parse a text as a conversation; None if it is ordinary text, such as an answer in JSON. Nothing is executed."""
    value = _parsed(text)
    return value if _is_conversation(value) else None


def _parsed(text: str) -> Any | None:
    """The list or mapping that a text spells out as JSON or Python, if it has the keys of messages."""
    text = text.strip()
    if not (text.startswith(("[", "{")) and text.endswith(("]", "}")) and any(key in text for key in SPEAKER_KEYS)):
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        return None
    except ValueError:
        try:
            with warnings.catch_warnings(action="ignore"):  # about escapes, since it may be ordinary text
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if _looks_like_turns(value) and not is_deep(value, text) else None


def _is_conversation(value: Any) -> bool:
    """True if text that was parsed is certainly messages: `{"from": "Paris", "to": "Rome"}` is an answer."""
    if isinstance(value, Mapping):
        return _is_message(value) and _role(value) in ROLES
    if not isinstance(value, list) or not all(map(_is_message, value)):
        return False
    return any(_role(turn) in ROLES for turn in value) or all(turn.keys() <= MESSAGE_KEYS for turn in value)


def _is_message(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content", turn.get("value"))
    return isinstance(_role(turn), str) and (isinstance(content, str | list) or bool(turn.get("tool_calls")))


def _role(turn: Mapping[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def read_text(value: Any, column: str) -> str:
    """The text of a cell. Raises RowProblem `null_field` or `not_text`."""
    if is_null(value):
        raise RowProblem("null_field", f"{column} is empty (null)")
    if not isinstance(value, str):
        raise RowProblem("not_text", f"{column} holds {type(value).__name__}, not text: {excerpt(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may hold half an emoji ("\ud83d"), which no tokenizer accepts
        raise RowProblem("not_text", f"{column} has a lone surrogate (half a character) at {error.start}") from None
    return value


def read_turns(value: Any, column: str) -> list[Message]:
    """The turns of a cell. Raises RowProblem `null_field`, `not_text` or `unknown_role`."""
    value = _unwrapped(value)
    if is_null(value) or value == [] or (isinstance(value, str) and not value.strip()):
        raise RowProblem("null_field", f"{column} is empty")
    if isinstance(value, str):
        value = _parsed(value)
    if not _looks_like_turns(value):
        raise RowProblem("not_text", f"{column} is not a list of messages, but in the other rows it is")
    turns = [value] if isinstance(value, Mapping) else value
    return [_read_turn(turn, f"{column}[{number}]") for number, turn in enumerate(turns)]


def read_dialogue(value: Any, column: str) -> list[Message]:
    r"""The turns of a text with `\n\nHuman:` and `\n\nAssistant:` markers, stripped of surrounding white space."""
    before, *parts = SPEAKER.split(read_text(value, column).lstrip())
    if before.strip() or not parts:
        raise RowProblem("not_a_dialogue", f"{column} does not start with 'Human:' as the other rows do")
    speakers, texts = parts[::2], parts[1::2]
    return [
        {"role": ROLES["human" if speaker == "Human" else "assistant"], "content": text.strip()}
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def same_turn(one: Message, other: Message) -> bool:
    """True if two turns are equal up to white space at the ends, which data sets add and lose arbitrarily."""
    if one["role"] != other["role"] or one["content"].strip() != other["content"].strip():
        return False
    one_thought, other_thought = (str(turn.get("reasoning_content", "")).strip() for turn in (one, other))
    return one_thought == other_thought and one.get("tool_calls") == other.get("tool_calls")


def excerpt(value: Any, length: int = 60) -> str:
    """The beginning of a value on one line, for a message."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _read_turn(turn: Any, where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowProblem("unknown_role", f"{where} has the role {role!r}; known roles are {', '.join(ROLES)}")
    # In a table every turn has every key, with null for the missing ones.
    beside = {key: turn[key] for key in BESIDE_CONTENT if turn.get(key)}
    if turn.get("function_call") and "tool_calls" not in beside:  # OpenAI's older form, one call a turn
        beside["tool_calls"] = [{"type": "function", "function": turn["function_call"]}]
    content = turn.get("content", turn.get("value"))
    if content is None and "tool_calls" in beside:
        content = ""
    thoughts = [turn[key] for key in THOUGHTS if turn.get(key) not in (None, "", [])]
    if not thoughts and isinstance(details := turn.get("reasoning_details"), list):  # OpenRouter's, in parts
        thoughts = [part for part in details if isinstance(part, Mapping) and (part.get("text") or part.get("summary"))]
    if isinstance(content, list):  # the newer form: [{"type": "text", "text": …}]
        thoughts += [part for part in content if _is_thought(part)]
        content = "".join(read_text(_text_part(part, where), where) for part in content if not _is_thought(part))
    if thoughts and ROLES[role] == "assistant":
        texts = dict.fromkeys(_thought_text(thought, where) for thought in thoughts)
        if any(text.strip() for text in texts):
            beside["reasoning_content"] = "\n\n".join(texts)
            content = "" if content is None else content
    return {"role": ROLES[role], "content": read_text(content, where), **beside}


def _is_thought(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in THOUGHT_PARTS


def _thought_text(thought: Any, where: str) -> str:
    """The text of a thought: of a string, of a typed part, or of a list of parts."""
    if isinstance(thought, list):
        return "\n\n".join(_thought_text(part, where) for part in thought)
    if isinstance(thought, Mapping):
        kept = [
            thought[key]
            for key in ("thinking", "text", "reasoning", "reasoning_content", "content", "summary")
            if thought.get(key)
        ]
        thought = _thought_text(kept[0], where) if kept else None
    return read_text(thought, f"{where}'s thought")


def _text_part(part: Any, where: str) -> Any:
    if not (isinstance(part, Mapping) and part.get("type") == "text"):
        raise RowProblem(
            "not_text",
            f"{where} has a part that is not text: {excerpt(part)} (text only today; image pairs are planned)",
        )
    return part.get("text")


def tools_in(value: Any) -> Any:
    """The functions in a cell with messages, or in one of its turns; None if there are none."""
    if isinstance(value, Mapping) and value.get("tools"):
        return value["tools"]
    turns = _unwrapped(value)
    turns = turns if isinstance(turns, list) else []
    return next((turn["tools"] for turn in turns if isinstance(turn, Mapping) and turn.get("tools")), None)


def _unwrapped(value: Any) -> Any:
    """Unwrap a prompt of OpenAI's preference files: {"messages": [...], "tools": [...]}."""
    return value["messages"] if isinstance(value, Mapping) and isinstance(value.get("messages"), list) else value


def _looks_like_turns(value: Any) -> bool:
    turns = [value] if isinstance(value, Mapping) else value
    if not (isinstance(turns, list) and turns):
        return False
    return all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns)


def is_null(value: Any) -> bool:
    """True for a cell without a value: null, or the NaN of a table."""
    return value is None or (isinstance(value, float) and value != value)  # NaN means null in tables
