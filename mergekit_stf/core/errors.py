"""The one error class of the package."""


class STFError(ValueError):
    """Input or recipe that cannot be merged.

    The message is one line that names the weight or the parameter, what came, and what to do.
    """
