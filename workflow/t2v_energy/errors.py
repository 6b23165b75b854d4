"""The one error type that users are meant to read."""


class UserError(Exception):
    """Something that the user can put right.

    The message says what is wrong, where (file, field, value) and what to do next; the command line
    prints it without a traceback and exits with code 2.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.remedy}" if self.remedy else head
