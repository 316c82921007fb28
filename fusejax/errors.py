"""Exceptions that end a job with one line: a user's mistake, and what the same command goes on from."""


class UserError(Exception):
    """Something the user can put right: bad input, bad configuration, a missing file.

    Its message is one line that names the file, key, tensor or document and says what would be right.
    The command line prints it without a traceback and exits with status 2.
    """


class Resumable(Exception):
    """The job was stopped from outside (SIGTERM, another process gone); the same command goes on from what is saved.

    Its message is one line. The command line prints it and exits with `STATUS`, EX_TEMPFAIL in sysexits.h: schedulers
    can requeue a job that ends so.
    """

    STATUS = 75


class Interrupted(Resumable):
    """The same by Ctrl-C."""

    STATUS = 130
