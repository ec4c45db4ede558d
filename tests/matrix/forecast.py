"""The forecast of a family's wider model against the traced step of it."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from qdpo.families.shapes import from_config
from qdpo.forecast import memory
from qdpo.forecast.memory import MemorySettings, RowSize
from qdpo.measure.trace import trace_peak
from qdpo.model.base.text_model import text_model_of
from qdpo.model.trace.store import finder
from tests.matrix.configs import MEDIUM
from tests.matrix.members import Member

RUN, ROW = MemorySettings(kept_layers=1), RowSize(1024, 400, 4)


def compare(member: Member, cache: Path) -> dict[str, Any]:
    """Bytes of both, for layers that are 1,024 wide, one of them kept, and rows of 1,024 tokens in 4 pairs."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    config = member.config(MEDIUM, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    written = json.loads(config.to_json_string())  # as a config.json has it
    shape = from_config(written, member.name, trace=finder(cache, print))
    found = memory.peak(shape, RUN, ROW) - sum(memory.outside(RUN).values())
    return {"forecast": found, "traced": trace_peak(text_model_of(config).config, RUN, ROW)["peak"]}
