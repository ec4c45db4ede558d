"""The forecast of a family's wider model against the traced step of it."""

import logging
import warnings
from typing import Any

from qdpo.families.shapes import from_config
from qdpo.forecast import memory
from qdpo.forecast.memory import MemorySettings, RowSize
from qdpo.measure.trace import trace_peak
from tests.matrix.configs import MEDIUM
from tests.matrix.members import Member

RUN, ROW = MemorySettings(kept_layers=1), RowSize(1024, 400, 4)


def compare(member: Member) -> dict[str, Any]:
    """Bytes of both, for four layers that are 1,024 wide, one of them kept, and rows of 1,024 tokens in 4 pairs."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    config = member.config(MEDIUM, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    shape = from_config(config.to_dict(), member.name)
    found = memory.peak(shape, RUN, ROW) - sum(memory.outside(RUN).values())
    return {"forecast": found, "traced": trace_peak(config, RUN, ROW)["peak"]}
