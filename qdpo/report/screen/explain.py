"""Looks up names in metrics.md, the page that explains metrics, beta, losses and modifiers to users."""

import difflib
import re
from pathlib import Path

from qdpo.errors import ConfigError
from qdpo.settings.loss_rules import RENAMED

PAGE = Path(__file__).with_name("metrics.md")


def explain(name: str | None = None) -> str:
    """The whole page, or the section of `name`: a metric, a loss, a setting of [loss], or the title of a chapter.

    A metric may begin with `eval_`, a setting with `loss.`. A part of a name, such as `margins` or `logps`, finds all
    metrics that contain it. Raises: ConfigError with the nearest names.
    """
    page = PAGE.read_text(encoding="utf-8")
    if name is None:
        return page.strip()
    wanted = name.lower()
    wanted = RENAMED.get(wanted, wanted)
    named = _sections(page)
    for candidate in (wanted, wanted.removeprefix("eval_").removeprefix("loss.")):
        found = [text for names, text in named if candidate in names]
        found = found or [text for names, text in named if any(candidate in known.split("/") for known in names)]
        if found:
            return "\n\n".join(found)
    close = difflib.get_close_matches(wanted, [known for names, _ in named for known in names], n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise ConfigError(f"No metric, loss or modifier is called {name!r}. {hint}`qdpo metrics` prints the whole page.")


def _sections(page: str) -> list[tuple[list[str], str]]:
    """Every section, up to the next of its level, with the names in its heading, else with its title."""
    headings = list(re.finditer(r"^(##+) (.+)$", page, re.MULTILINE))
    found = []
    for number, heading in enumerate(headings):
        later = (other.start() for other in headings[number + 1 :] if len(other[1]) <= len(heading[1]))
        text = page[heading.start() : next(later, len(page))].strip()
        found.append((re.findall(r"`([^`]+)`", heading[2]) or [heading[2].lower()], text))
    return found
