"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right: bad input, bad configuration, a missing file.

    Its message is one line that names the file, key, tensor or document and says what would be right.
    The command line prints it without a traceback and exits with status 2.
    """
