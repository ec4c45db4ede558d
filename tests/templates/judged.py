"""Pairs of every kind, and the judgement on what a chat template and the renderer make of them.

The oracle is transformers' apply_chat_template alone, and the words that each row holds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from qdpo.data.layouts.pair import Message, Pair, Rejection, detect_layout, to_pair
from qdpo.data.tokens.render import Renderer
from qdpo.errors import ConfigError

Kind = dict[str, Any]
QUESTION = {"role": "user", "content": "What is two plus two?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "the city"}},
                "required": ["city"],
            },
        },
    }
]


def _call(arguments: Any) -> Message:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00001", "function": function}],
    }


def _answers(chosen: Any, rejected: Any, **beside: Any) -> Kind:
    def turn(answer: Any) -> Message:
        return answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}

    return {"prompt": [QUESTION], "chosen": [turn(chosen)], "rejected": [turn(rejected)], **beside}


def _thought(key: str) -> Kind:
    return _answers(
        {"role": "assistant", "content": "It is four.", key: "Wondering about sums"},
        {"role": "assistant", "content": "It is five.", key: "Guessing wildly"},
    )


PARTS = [{"type": "thinking", "thinking": "Wondering about sums"}, {"type": "text", "text": "It is four."}]
OTHERS = [{"type": "thinking", "thinking": "Guessing wildly"}, {"type": "text", "text": "It is five."}]
TALK = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hello friend."}]
KINDS: dict[str, Kind] = {
    "plain": _answers("It is four.", "It is five."),
    "system": {
        **_answers("It is four.", "It is five."),
        "prompt": [{"role": "system", "content": "Be brief."}, QUESTION],
    },
    "turns": {**_answers("It is four.", "It is five."), "prompt": [*TALK, QUESTION]},
    "reasoning": _thought("reasoning_content"),
    "thinking": _thought("thinking"),
    "parts": _answers({"role": "assistant", "content": PARTS}, {"role": "assistant", "content": OTHERS}),
    "inline": _answers(
        "<think>\nWondering about sums\n</think>\n\nIt is four.", "<think>\nGuessing wildly\n</think>\n\nIt is five."
    ),
    "generated": _answers("Wondering about sums\n</think>\n\nIt is four.", "Guessing wildly\n</think>\n\nIt is five."),
    "call": _answers(_call({"city": "Paris"}), "I do not know.", tools=TOOLS),
    "text call": _answers(_call('{"city": "Paris"}'), "I do not know.", tools=TOOLS),
    "tool turns": {
        **_answers("It is mild, 18 degrees.", "It is cold.", tools=TOOLS),
        "prompt": [
            {"role": "user", "content": "Weather in Paris?"},
            _call({"city": "Paris"}),
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "18 degrees"},
        ],
    },
    "special": _answers("The token <|im_end|> does, or </s>.", "Nothing <|eot_id|> does."),
}
WORDS = {
    "reasoning": ("Wondering about sums", "It is four."),
    "thinking": ("Wondering about sums", "It is four."),
    "parts": ("Wondering about sums", "It is four."),
    "inline": ("Wondering about sums", "It is four."),
    "generated": ("Wondering about sums", "It is four."),
    "call": ("weather", "Paris"),
    "text call": ("weather", "Paris"),
    "tool turns": ("It is mild, 18 degrees.",),
    "special": ("The token ",),
}


@dataclass(frozen=True)
class Judged:
    """What became of one row: `=` the template's own text, `+` every word held, `-` dropped, `!` wrong."""

    kind: str
    mark: str
    reason: str = ""
    detail: str = ""
    prompt: str = ""
    answer: str = ""


def judge(tokenizer: Any, kind: str, options: Mapping[str, Any], *, reasoning: str = "drop") -> Judged:
    """Renders one kind of row and holds it against the tokenizer's own template."""
    row = KINDS[kind]
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    if isinstance(pair, Rejection):
        return Judged(kind, "!", pair.reason, f"not read: {pair.detail}")
    try:
        found = Renderer(tokenizer=tokenizer, options=options, reasoning=reasoning).render(pair)  # type: ignore[arg-type]
    except ConfigError as error:
        return Judged(kind, "-", "template_is_broken", str(error))
    if isinstance(found, Rejection):
        return Judged(kind, "-", found.reason, found.detail)
    spelt = {ord(letter): text for letter, text in found.hidden.items()}
    prompt, chosen, rejected = (text.translate(spelt) for text in found.three)
    problems = list(_problems(tokenizer, pair, kind, options, prompt, chosen, rejected))
    if problems:
        return Judged(kind, "!", detail="; ".join(problems), prompt=prompt, answer=chosen)
    whole = _whole(tokenizer, [*row["prompt"], row["chosen"][0]], row.get("tools"), options)
    same = whole is not None and whole.startswith(prompt + chosen)
    return Judged(kind, "=" if same else "+", prompt=prompt, answer=chosen)


def _problems(
    tokenizer: Any, pair: Pair, kind: str, options: Mapping[str, Any], prompt: str, chosen: str, rejected: str
) -> Any:
    served = _whole(tokenizer, pair.prompt, pair.tools, options, add_generation_prompt=True)
    if kind == "tool turns" and prompt != served:  # a template that takes calls in another form
        served = _whole(tokenizer, _flat(pair.prompt), pair.tools, options, add_generation_prompt=True)
    if served is not None and prompt != served and kind != "system":
        yield f"the prompt is not the served one: {prompt[-60:]!r}, served {served[-60:]!r}"
    for word in WORDS.get(kind, ("It is four.",)):
        if word not in chosen:
            yield f"{word!r} is missing in {chosen!r}"
        if chosen.count(word) > 1 and "call" not in kind:
            yield f"{word!r} stands twice in {chosen!r}"
    whole = prompt[prompt.rfind(pair.prompt[-1]["content"]) :] + chosen
    opening = re.findall(r"<[\w:.-]*think[\w:.-]*>|\[THINK\]|<\|START_THINKING\|>", whole)
    closing = re.findall(r"</[\w:.-]*think[\w:.-]*>|\[/THINK\]|<\|END_THINKING\|>", whole)
    if len(opening) > 1 or len(closing) > 1:
        yield f"a thought stands twice: {whole!r}"
    if len(opening) > len(closing):
        yield f"a thought stays open: {whole!r}"
    if kind == "generated" and opening and "Wondering about sums\n</think>\n\nIt is four." not in chosen:
        if re.search(r"<think>\s*\Z", prompt):
            yield f"not as it was generated: {chosen!r}"
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(chosen.endswith(token) for token in special):
        yield f"the answer has no end token: {chosen[-30:]!r}"
    ends = [token for token in special if chosen.endswith(token)]
    if kind != "special" and any(chosen.count(token) > 1 for token in ends if "call" not in kind):
        if "channel" not in chosen and "<|begin|>" not in chosen:
            yield f"the end stands twice: {chosen!r}"
    if r"\"city" in chosen:
        yield f"the arguments are encoded twice: {chosen!r}"
    if "'city'" in chosen:
        yield f"the arguments are Python's text: {chosen!r}"
    if chosen == rejected:
        yield "both answers are the same"


def _flat(turns: list[Message]) -> list[Message]:
    """Calls beside `function`, without content and with their arguments as text."""
    found = []
    for turn in turns:
        if "tool_calls" in turn:
            call = turn["tool_calls"][0]["function"]
            turn = {"role": "assistant", "tool_calls": [{**call, "arguments": json.dumps(call["arguments"])}]}
        found.append(turn)
    return found


def _whole(tokenizer: Any, turns: list[Any], tools: Any, options: Mapping[str, Any], **others: bool) -> str | None:
    """transformers' own text of a conversation; None if the template refuses it."""
    turns = json.loads(json.dumps(turns))
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options, **others))
    except (TemplateError, TypeError, ValueError):
        return None
