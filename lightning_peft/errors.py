"""What a user got wrong, said in one sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave and can change: a key, a value, a file.

    The message is one sentence: what was given, what is wrong with it, what would do. The command
    line prints it without a traceback; every other exception is a bug and keeps its traceback.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that the user named, or a command needs, and that is not there."""

    def __str__(self) -> str:
        """The sentence alone, without the error number of an ``OSError``."""
        return str(self.args[0])
