"""The border to libraries that read a model's files: whatever they raise over a damaged file is the file's fault."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from qdpo.errors import ConfigError, QdpoError

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
PANIC = "PanicException"  # pyo3's, for a failed assertion in Rust; no Exception, and importable from nowhere


@contextmanager
def reading(what: str, way_out: str) -> Iterator[None]:
    """Turns each exception of the block into a ConfigError: "`what`: error. `way_out`".

    The block calls other libraries only: transformers, tokenizers and their validators raise many types for wrong
    values in a file, a plain Exception among them. What is not about the file passes: lack of memory, a full or failing
    disk, signals.
    """
    try:
        yield
    except (QdpoError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) in DISK:  # the former is torch's
            raise
        raise ConfigError(f"{what}: {_said(error)}. {way_out}") from error
    except BaseException as error:
        if type(error).__name__ == PANIC:
            raise ConfigError(f"{what}: {_said(error)}. {way_out}") from error
        raise


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400].rstrip(".")
    return text if isinstance(error, (OSError, ValueError, ImportError)) and text else f"{type(error).__name__}: {text}"
