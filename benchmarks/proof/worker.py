"""One item in a process of its own: `python -m benchmarks.proof.worker` reads the item, and answers with its result.

Memory that runs out, on the device or by the forecast, is an answer. Whatever else breaks ends the process, and its
traceback is on standard error.
"""

import importlib
from typing import Any

import torch

from benchmarks.proof.items import FAILED, NOT_APPLICABLE, NOT_MEASURED, OK, OUT_OF_MEMORY
from benchmarks.rounds import Parent
from qdpo import errors
from qdpo.cli_measure import quiet_libraries
from qdpo.train.step import RowTooLarge


class NotApplicable(Exception):
    """Something that only exists on CUDA, asked for on the CPU."""


class NotMeasured(Exception):
    """Something that is missing here, and that the message names."""


class Failed(Exception):
    """It ran, and what it found is wrong; `values` say what."""

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


def main() -> None:
    quiet_libraries()
    parent = Parent()
    module = importlib.import_module(f"benchmarks.proof.{parent.job['module']}")
    # Raised by modules that import this one under its own name.
    here = importlib.import_module("benchmarks.proof.worker")
    status, values, said = OK, dict[str, Any](), ""
    try:
        values = getattr(module, parent.job["function"])(parent.job["job"])
    except (torch.cuda.OutOfMemoryError, errors.OutOfMemoryError, RowTooLarge) as error:
        status, said = OUT_OF_MEMORY, str(error).splitlines()[0]
    except here.NotApplicable as error:
        status, said = NOT_APPLICABLE, str(error)
    except here.NotMeasured as error:
        status, said = NOT_MEASURED, str(error)
    except here.Failed as error:
        status, said, values = FAILED, str(error), error.values
    except errors.QdpoError as error:
        status, said = FAILED, str(error)
    parent.answer(status=status, values=values, said=said[:1500])


if __name__ == "__main__":
    main()
