"""The command line: verbs in the order of the help; a QdpoError becomes one message and an exit code."""

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qdpo import __version__
from qdpo.cli import collect, common, data, forecast, machine, review, ship, train
from qdpo.cli.common import EXTRA
from qdpo.errors import DiskError, OutOfMemoryError, QdpoError
from qdpo.report.screen.outside_text import protect_terminal

READER_GONE = 128 + 13
"""As if SIGPIPE had ended the process: `qdpo metrics | head` has what it wanted."""
# Causes of an OSError that need no file's name to be no bug.
OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
}  # fmt: skip
app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Preference-tune a 7B-13B language model on one consumer GPU: DPO with a LoRA adapter over a 4-bit base.",
)
app.add_typer(machine.cache, name="cache")
app.add_typer(data.app, name="data")
app.command(context_settings=EXTRA)(train.run)
app.command(context_settings=EXTRA)(forecast.plan)
app.command()(forecast.fit)
app.command(context_settings=EXTRA)(forecast.bench)
app.command(context_settings=EXTRA)(collect.sample)
app.command()(collect.label)
app.command()(collect.judge)
app.command()(review.report)
app.command(context_settings=EXTRA)(review.compare)
app.command(context_settings=EXTRA)(review.chat)
app.command(context_settings=EXTRA)(train.sweep)
app.command()(ship.merge)
app.command()(ship.export)
app.command()(ship.push)
app.command()(machine.doctor)
app.command(name="presets")(forecast.presets_)
app.command()(review.runs)
app.command(name="eval", context_settings=EXTRA)(review.eval_)
app.command()(review.metrics)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qdpo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ["QDPO_VERBOSE"] = "1" if verbose else ""


def main() -> None:
    """Console entry point. Exit codes are those of `errors`; 130 for an interruption before anything was saved."""
    protect_terminal()
    try:
        app()
    except QdpoError as error:
        _show_traceback()
        if common.run_folder and common.run_folder[-1].is_dir():
            _note(common.run_folder[-1], error)
        print(f"qdpo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        sys.exit(_not_a_bug(end))
    except (OSError, MemoryError) as error:
        _show_traceback()
        if not (known := _of_the_machine(error)):
            _report_bug(error)
        _note(_folder_of_notes(), error)
        print(f"qdpo: {known}", file=sys.stderr)
        sys.exit(known.exit_code)
    except KeyboardInterrupt:
        print("qdpo: stopped. What was saved before is intact; the same command resumes.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _show_traceback()
        _report_bug(error)


def _not_a_bug(end: SystemExit) -> Any:
    """The exit code, where typer's 1 stands for an answer that never came, or for a reader that has gone."""
    cause = end.__context__
    if end.code == 1 and isinstance(cause, BrokenPipeError):
        # What is still to be written goes nowhere, without a second error at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    if end.code == 1 and type(cause).__name__ == "Abort":
        return 130
    return end.code


def _of_the_machine(error: OSError | MemoryError) -> QdpoError | None:
    """What the operating system refused, and of which file: no bug, wherever it happens. None if it names no cause.

    Errors with a better message are raised where they occur; this is the net below them.
    """
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "The host's memory is full. Close other programs or give smaller inputs, then run the same command again."
        )
    if error.filename is None and error.errno not in OF_THE_DISK:
        return None
    files = " and ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    return DiskError(
        f"The system refuses access to {files or 'a file'}: {error.strerror}. Check that path, its permissions and the "
        "free space, then run the same command again. What was saved before is intact."
    )


def _report_bug(error: Exception) -> NoReturn:
    path = _note(_folder_of_notes(), error)
    what = (str(error).splitlines() or [""])[0]
    print(
        f"qdpo: unexpected {type(error).__name__}: {what}. This is a bug in qdpo; what was saved before is intact. "
        f"The traceback is in {path or 'no file: none could be written (-v shows it)'}; please report it.",
        file=sys.stderr,
    )
    sys.exit(1)


def _folder_of_notes() -> Path:
    from qdpo.run.disk import cache_folder

    is_run = bool(common.run_folder) and common.run_folder[-1].is_dir()
    return common.run_folder[-1] if is_run else cache_folder(None)


def _show_traceback() -> None:
    if os.environ.get("QDPO_VERBOSE"):
        traceback.print_exc()


def _note(folder: Path, error: Exception) -> Path | None:
    from qdpo.machine.debug_log import note

    return note(folder, error, sys.argv[1:])


if __name__ == "__main__":
    main()
