"""One item in a process of its own: `python -m benchmarks.proof.worker` reads the item, and answers with its result.

Memory that runs out, on the device or by the forecast, is an answer. Whatever else breaks ends the process, and its
traceback is on standard error.
"""

import importlib
import os
import signal
import sys
import threading
import time
from typing import Any

from benchmarks.proof import items
from benchmarks.rounds import Parent
from qdpo import errors
from qdpo.cli.common import quiet_libraries


def main() -> None:
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    quiet_libraries()
    parent = Parent()
    function = getattr(importlib.import_module(parent.job["module"]), parent.job["function"])
    status, values, said = items.OK, dict[str, Any](), ""
    try:
        values = function(parent.job["job"])
    except ran_out() as error:
        status, said = items.OUT_OF_MEMORY, str(error).splitlines()[0]
    except items.NotApplicable as error:
        status, said = items.NOT_APPLICABLE, str(error)
    except items.NotMeasured as error:
        status, said = items.NOT_MEASURED, str(error)
    except items.Failed as error:
        status, said, values = items.FAILED, str(error), error.values
    except errors.QdpoError as error:
        status, said = items.FAILED, str(error)
    parent.answer(status=status, values=values, said=said[:1500])


def end_with(parent: int) -> None:
    """Ends this process and all that it started once the parent is gone, which may not have had time to do it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def ran_out() -> tuple[type[Exception], ...]:
    """What says that memory ran out; looked up once something was raised, for not every item needs torch."""
    if "torch" not in sys.modules:
        return (errors.OutOfMemoryError,)
    import torch

    from qdpo.train.step.step import RowTooLarge

    return errors.OutOfMemoryError, torch.cuda.OutOfMemoryError, RowTooLarge


if __name__ == "__main__":
    main()
