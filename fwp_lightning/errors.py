"""Errors that a user can put right: the command line prints their one sentence and no traceback."""


class UserError(Exception):
    """A mistake or an obstacle outside the program; its text is one sentence that says what to do."""


class RunBusy(Exception):
    """Another process holds the lock of a run."""


class RunStopped(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM, or its parent process ended); it continues with the next sweep."""


def sentence_of(error: BaseException) -> str:
    """Return the error as one line: the text alone for errors meant for users, else with the name of its class."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | ValueError) and text:
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
