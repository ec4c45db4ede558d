"""The console that draws tables, bars and colours: text from outside neither controls the terminal nor is markup."""

from collections.abc import Iterable
from typing import IO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qdpo.report.screen.outside_text import clean


class Screen(Console):
    """A rich console whose text is cleaned after layout, and where [brackets] are brackets. Styles come as Text."""

    def __init__(self, *, stderr: bool = False):
        # emoji=False: else openai:m: becomes Ⓜ
        super().__init__(highlight=False, soft_wrap=True, stderr=stderr, emoji=False, markup=False)

    @property
    def file(self) -> IO[str]:
        """The stream behind the door of `outside_text`, which would take rich's colours away."""
        chosen = super().file
        raw: IO[str] = getattr(chosen, "raw_stream", chosen)
        return raw

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Lines and styles as rich makes them, each text cleaned; rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)
