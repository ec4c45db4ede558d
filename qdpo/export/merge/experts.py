"""The experts that a run had in 4 bits, made again matrix by matrix, as the tensors of the base's files hold them."""

from collections.abc import Iterator

from torch import Tensor

from qdpo.export.merge.source import MergeSource
from qdpo.model.base.expert_files import ExpertSource, read_part
from qdpo.model.base.expert_stack import quantised


class ExpertMatrices:
    """Matrices that went through 4 bits and back, each proved by the run's digest; the last one is kept.

    Files that hold each expert's matrices have gate and up next to each other, and both come from one matrix.
    """

    def __init__(self, source: MergeSource):
        self._source = source
        self._last: tuple[str, int] | None = None
        self._parts: dict[str, Tensor] = {}
        self._seen: set[tuple[str, int]] = set()

    def of(self, key: str) -> Iterator[tuple[Tensor, bool]]:
        """A tensor of the files, expert by expert, and whether a matrix was made for the first time.

        Raises: VerificationError if a matrix differs from the one that the run was trained on.
        """
        stack, mark = self._source.experts[key]
        for expert in stack.experts_in(key):
            place = (stack.stack, expert)
            is_first = place not in self._seen
            if place != self._last:
                self._parts = self._made(stack, expert, (mark.experts or [])[expert])
                self._last = place
            self._seen.add(place)
            yield self._parts[key], is_first

    def _made(self, stack: ExpertSource, expert: int, recorded: str) -> dict[str, Tensor]:
        source = self._source
        assert source.form is not None
        dtype = source.form.dtype
        matrix = stack.matrix(expert, lambda name, place: read_part(source.tensors[name], place, dtype))
        made = quantised(matrix.to(source.device), source.form)
        source.prove(f"expert {expert} of {stack.stack}", made.digest(0), recorded)
        return stack.back(expert, made[0].cpu())
