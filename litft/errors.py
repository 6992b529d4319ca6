"""The errors that a user's mistake may raise. The command line prints them without a traceback and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: one to five lines saying what, where and how to mend it."""


class Failed(Exception):
    """The run ended for a reason that lies in neither litft nor the command: a full disk, a dead process, a bad loss.

    One to five lines, as `UserError`; the exit code is 1.
    """


class DataError(UserError):
    """A row, or a file of rows, that cannot be used.

    Args:
        what: what is wrong, in a few words ("unknown role 'robot'").
        file: the file or data set it stands in.
        line: 1-based line (JSONL) or row number.
        mend: what to do about it ("use one of system, user, assistant, tool").
        snippet: the offending text, shortened by the caller to at most 80 characters.
    """

    def __init__(
        self, what: str, *, file: str | None = None, line: int | None = None, mend: str = "", snippet: str = ""
    ) -> None:
        self.what, self.file, self.line, self.mend, self.snippet = what, file, line, mend, snippet
        super().__init__(what, file, line, mend, snippet)  # every part in args, so that it pickles across workers

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line is not None else f"{self.file}: " if self.file else ""
        mend = f"; {self.mend}" if self.mend else ""
        snippet = f"\n    {self.snippet}" if self.snippet else ""
        return f"{where}{self.what}{mend}{snippet}"

    def __reduce__(self) -> tuple:
        state = {"file": self.file, "line": self.line, "mend": self.mend, "snippet": self.snippet}
        return _rebuild, (type(self), self.what, state)


def _rebuild(cls: type[DataError], what: str, state: dict) -> DataError:
    return cls(what, **state)
