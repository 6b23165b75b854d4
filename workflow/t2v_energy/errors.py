"""The one error type that users are meant to read."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Something that the user can put right.

    The message says what is wrong, where (file, field, value) and what to do next; the command line
    prints it without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments do not survive pickling by themselves, and errors cross processes.
        return _restored, (type(self), self.what, self.where, self.remedy)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.remedy}" if self.remedy else head


def _restored(kind: type[UserError], what: str, where: str, remedy: str) -> UserError:
    return kind(what, where=where, remedy=remedy)
