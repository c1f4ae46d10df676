"""The one family of exceptions: what went wrong, where, and the fix.

Every error that a user can cause or meet is raised as one of these classes, where the fact is known.
The command line maps them to exit codes in one place (``loramerge.cli.main``); a library user catches
:class:`LoramergeError`.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoramergeError(Exception):
    """Base of the family.

    Args:
        code: stable dotted name of the error, for programs (``"adapter.unmatched"``).
        message: what went wrong, one line, no trailing full stop.
        fix: one thing to do, with the flag or command; by default what helps for errors of its class.
        file: the file it is about, as the user typed it.
        tensors: names of the tensors, keys or modules it is about.
    """

    exit_code = 1
    usual_fix = ""
    """What helps where nothing more exact is known."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fix: str = "",
        file: object = None,
        tensors: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix or self.usual_fix
        self.file = None if file is None else str(file)
        self.tensors = tuple(tensors)


class UsageError(LoramergeError):
    """The request itself makes no sense (exit 2)."""

    exit_code = 2
    usual_fix = "see --help"


class InputError(LoramergeError):
    """An input file is broken or is not what it claims to be (exit 3)."""

    exit_code = 3
    usual_fix = "the file is damaged or was edited: save or download it again"


class MismatchError(LoramergeError):
    """Inputs that are each valid do not belong together (exit 3)."""

    exit_code = 3
    usual_fix = "give the base that the adapter was trained on"


class UnsupportedError(LoramergeError):
    """A valid input that cannot be done, refused by name (exit 3)."""

    exit_code = 3
    usual_fix = "run the adapter beside its model instead (unmerged)"


class UnsafeError(LoramergeError):
    """An input that would need trust it has not been given (exit 3)."""

    exit_code = 3
    usual_fix = "get the file from a source that you trust, in safetensors format"


class OutputError(LoramergeError):
    """The output cannot be written: it exists, no space, no permission (exit 4)."""

    exit_code = 4


class RemoteError(LoramergeError):
    """The Hub or the network (exit 5)."""

    exit_code = 5
