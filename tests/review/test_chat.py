"""Two conversations at once, from a pipe: who answers, what each remembers, and how it is stopped."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from qdpo.review import chat as room
from qdpo.review.chat import Chat, talk
from qdpo.review.open import reopen, tuned
from qdpo.run.record import Result
from tests.conftest import Quiet, qdpo

Train = Callable[..., tuple[Result, Quiet]]
GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}


@pytest.fixture
def chat(train: Train, settings: dict[str, str]) -> Chat:
    train(train__steps="6")
    opened = reopen(Path(settings["output.dir"]) / "run", [], Quiet())
    policy, tokenizer = tuned(opened, Quiet())
    return Chat(policy=policy, tokenizer=tokenizer, data=opened.config.data, **GREEDY, seed=0)


def said(chat: Chat, *lines: str) -> str:
    out = StringIO()
    talk(chat, StringIO("".join(line + "\n" for line in lines)), out)
    return out.getvalue()


def test_both_sides_answer_and_remember(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    stream = room.stream
    monkeypatch.setattr(
        room, "stream", lambda p, t, ids, *a, **k: (prompts.append(t.decode(ids)), stream(p, t, ids, *a, **k))[1]
    )
    shown = said(
        chat, "about rivers", "/tuned", "and stones?", "/reset", "/system Be brief.", "/both", "hello", "/quit", "x"
    )
    assert shown.count("base: ") == 2 and shown.count("tuned: ") == 3
    assert len(prompts) == 5 and prompts[0] == prompts[1] and prompts[3] == prompts[4]
    assert "about rivers" in prompts[2] and "and stones?" in prompts[2] and prompts[2].count("assistant") == 2
    assert "Be brief." in prompts[3] and "rivers" not in prompts[3]
    assert shown.split("base: ")[1].split("\n")[0] != shown.split("tuned: ")[1].split("\n")[0]


def test_ctrl_c_stops_an_answer_and_twice_leaves(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: Any, **named: Any) -> None:
        words[3]("half an ")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "stream", interrupted)
        assert "stopped; Ctrl-C again quits" in said(chat, "about rivers")
        assert chat.said["base"][-1] == {"role": "assistant", "content": "half an"} and not chat.said["tuned"]
        lines = iter(["about rivers\n"])

        class Pipe(StringIO):
            def readline(self, *words: Any) -> str:
                if (line := next(lines, None)) is None:
                    raise KeyboardInterrupt
                return line

        with pytest.raises(KeyboardInterrupt):
            talk(chat, Pipe(), StringIO())
    assert "tuned: " in said(chat, "about stones")  # the adapter is on again


def test_an_answer_cannot_steer_the_terminal() -> None:
    assert room._plain("a\x1b[2Jb\r\nc\té") == "a[2Jb\nc\té"


def test_from_the_command_line(train: Train, settings: dict[str, str], tmp_path: Path) -> None:
    none = qdpo("chat", str(tmp_path), cwd=tmp_path)
    assert none.returncode == 2 and "is not a run" in none.stderr
