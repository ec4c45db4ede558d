"""Chat templates under bounds: a render ends in time, in little memory, and with one exception whatever goes wrong.

transformers prepares the values and its template's text is the one returned; only the jinja environment is a copy with
bounds (`template_sandbox`). The time is watched by a thread, since signals exist neither on Windows nor off the main
thread.
"""

import ctypes
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from qdpo.data.tokens.template_sandbox import BoundedSandbox, TooLarge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""Time for one render. The largest real template with tools and 500 turns takes 0.1 s."""
POLL_S = 0.05
LONGEST_TEMPLATE = 1_000_000  # characters; the longest template in use has 25,000
MARK = "{#- rendered by qdpo's sandbox: "
PROBES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Why?"}],
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
)


class TemplateFault(Exception):
    """A chat template did not give a text.

    `refused` is true if the template itself refused the row, with `raise_exception`; otherwise the template is broken,
    at least for this row. `bound` is true for a bound of time or size. `line` is the template's, where it is known.
    """

    def __init__(self, message: str, *, line: int | None = None, refused: bool = False, bound: bool = False):
        self.line, self.refused, self.bound = line, refused, bound
        super().__init__(message if line is None or refused else f"line {line} of the chat template: {message}")


class _OutOfTime(BaseException):
    """Raised in the rendering thread by the watching thread."""


def render(
    tokenizer: "PreTrainedTokenizerBase", turns: list[Any], tools: list[Any] | None = None, **options: Any
) -> str:
    """The conversation's text, as `tokenizer.apply_chat_template(…, tokenize=False)` gives it.

    Raises: TemplateFault for every way in which the template can fail.
    """
    watch = _Watch(threading.get_ident())
    try:
        with _Watched(watch):
            text = _apply(tokenizer, turns, tools, options)
            text.encode()  # a lone surrogate would fail in the tokenizer
            return text
    except _OutOfTime:
        raise TemplateFault(f"it is not finished after {SECONDS:.0f} s", line=watch.line, bound=True) from None
    except TemplateFault:
        raise
    except Exception as error:  # a template is a program of someone else: it may raise anything
        raise _fault(error) from None


def probe_template(tokenizer: "PreTrainedTokenizerBase", **options: Any) -> None:
    """Render two plain conversations, which every chat template takes.

    Raises: TemplateFault if the template is broken (not if it refuses).
    """
    for turns in PROBES:
        try:
            render(tokenizer, turns, add_generation_prompt=turns[-1]["role"] == "user", **options)
        except TemplateFault as fault:
            if not fault.refused:
                raise


def _fault(error: Exception) -> TemplateFault:
    if isinstance(error, TooLarge):
        return TemplateFault(str(error), line=_line(error), bound=True)
    if isinstance(error, RecursionError):
        line = _line(error)
        what = "its blocks are nested too deeply" if line is None else "it calls itself without end"
        return TemplateFault(what, line=line)
    if isinstance(error, MemoryError):
        return TemplateFault("it needs more memory than there is", line=_line(error), bound=True)
    if isinstance(error, UnicodeEncodeError):
        return TemplateFault(f"its text has half of a surrogate pair ({error.object[error.start]!r})")
    if type(error) is TemplateError:
        return TemplateFault(str(error), line=_line(error), refused=True)
    if isinstance(error, TemplateSyntaxError):
        return TemplateFault(f"it is not valid jinja: {error.message}", line=error.lineno)
    said = str(error).strip().split("\n")[0][:300]
    return TemplateFault(f"{type(error).__name__}: {said}", line=_line(error))


def _line(error: BaseException) -> int | None:
    """The template's line: jinja rewrites the tracebacks of exceptions, but not of `_OutOfTime`."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if isinstance(template := frame.f_globals.get("__jinja_template__"), Template):  # not rewritten
            found = template.get_corresponding_lineno(line)
        elif frame.f_code.co_filename == "<template>":
            found = line
    return found


# The rendering.


def _apply(
    tokenizer: "PreTrainedTokenizerBase", turns: list[Any], tools: list[Any] | None, options: dict[str, Any]
) -> str:
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # no template in jinja
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options))
    source = tokenizer.get_chat_template(None, tools)
    if not isinstance(source, str) or len(source) > LONGEST_TEMPLATE:
        what = f"of {len(source):,} characters" if isinstance(source, str) else f"a {type(source).__name__}"
        raise TemplateFault(f"the chat template is {what}, not a text of at most {LONGEST_TEMPLATE:,} characters")
    mark = _stand_in(source)
    return str(tokenizer.apply_chat_template(turns, tools=tools, chat_template=mark, tokenize=False, **options))


def _stand_in(source: str) -> str:
    """A comment that transformers takes for the template, and in whose place the bounded template is rendered.

    transformers compiles each template once and keeps it. For this one, the kept object renders in our sandbox.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    mark = f"{MARK}{hash(source)} {threading.get_ident()} -#}}"
    kept = _compile_jinja_template(mark)
    if getattr(kept, "source", None) != source:
        sandbox = BoundedSandbox(kept.environment)
        bounded: Template = sandbox.from_string(source)
        kept.source = source
        kept.render = lambda **values: sandbox.render_bounded(bounded, values)
    return mark


# The time.


@dataclass
class _Watch:
    thread: int
    polls: int = 0
    fired: bool = False
    passed_over: bool = False
    done: bool = False
    line: int | None = None


class _Watched:
    """A `with` clause whose body is ended by `_OutOfTime`; contextlib's own would cost as much as a render."""

    def __init__(self, watch: _Watch):
        self._watch = watch

    def __enter__(self) -> None:
        _WATCHER.add(self._watch)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        watch = self._watch
        watch.done = True
        if isinstance(error, _OutOfTime):
            watch.line = _line(error)
        elif watch.fired:  # the exception is on its way to this thread: it must not arrive later, in other code
            for _ in range(1000):
                if watch.passed_over:
                    return
                time.sleep(0.001)
            raise _OutOfTime


class _Watcher:
    """One thread for the process, which looks every `POLL_S` at what is being rendered.

    It counts its looks, not the clock: a process that was stopped for an hour has not rendered for an hour.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._watches: dict[int, _Watch] = {}

    def add(self, watch: _Watch) -> None:
        self._watches[watch.thread] = watch
        if self._thread is None or not self._thread.is_alive():  # also in the child of a fork
            self._wake = threading.Event()
            self._thread = threading.Thread(target=self._look, name="templates", daemon=True)
            self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def _look(self) -> None:
        wake, idle = self._wake, 0
        while True:
            wake.wait()
            time.sleep(POLL_S)
            running = [watch for watch in list(self._watches.values()) if not watch.done]
            idle = 0 if running else idle + 1
            if idle > 100:
                wake.clear()
            for watch in running:
                watch.polls += 1
                if watch.polls * POLL_S > SECONDS and not watch.fired:
                    self._end(watch)

    def _end(self, watch: _Watch) -> None:
        # The order matters: the render sets `done` and then reads `fired`, so one of the two sees the other.
        watch.fired = True
        if watch.done:
            watch.passed_over = True
        else:
            thread, exception = ctypes.c_ulong(watch.thread), ctypes.py_object(_OutOfTime)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, exception)


_WATCHER = _Watcher()
