"""What a user sees when something is wrong: one line that names the remedy, exit code 2, no traceback.

And when something is doubtful: one line too, `monde: warning: ...`, whoever warns, each text once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from hostcompute import env

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError)

# Typer carries click inside since 0.20 and beside it before; its exceptions are reached through a public one.
_UsageError: Any = typer.BadParameter.__base__


def one_line(error: BaseException) -> str:
    """The message of an error on a single line; libraries like to spread theirs over several."""
    message = error.format_message() if isinstance(error, _UsageError) else str(error)
    return " ".join(message.split()) or type(error).__name__


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Python's warnings without the place in the code, which MONDE_DEBUG=1 keeps."""
    seen: set[str] = set()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"monde: warning: {text}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        if not env.debug():
            warnings.showwarning = show
        yield


class OneLineErrors(TyperGroup):
    """A command group that reports users' mistakes in one line. MONDE_DEBUG=1 keeps the traceback.

    The context's `obj` is the command as it was typed, whoever called.
    """

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if sys.stdout is None:
            _fail("standard output is closed; open it or redirect it to a file")
        extra |= {"standalone_mode": False, "obj": shlex.join(["monde", *args])}
        try:
            with one_line_warnings():
                code = super().main(args, **extra)
            sys.stdout.flush()  # here, where a full disk still gets its line
            if code == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this
                raise KeyboardInterrupt
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # not public; its message is the help
                error.show()
                sys.exit(EXIT_USER_ERROR)
            hint = f" (see `{error.ctx.command_path} --help`)" if getattr(error, "ctx", None) else ""
            _fail(one_line(error).rstrip(".") + hint)
        except BrokenPipeError:  # the reader of our output went away, as in `monde bench ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except USER_ERRORS as error:
            if env.debug():
                raise
            _fail(one_line(error))
        except (KeyboardInterrupt, typer.Abort):
            _fail("interrupted", EXIT_INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, exit_code: int = EXIT_USER_ERROR) -> NoReturn:
    print(f"monde: error: {message}", file=sys.stderr)
    sys.exit(exit_code)
