"""The one error class of the package."""


class STFError(ValueError):
    """Input or recipe that cannot be merged.

    The message is one line that names the weight or the parameter, what came, and what to do.
    Where several things are wrong at once, each has a line of its own below it.

    Args:
        lines: the message, and what stands below it.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        """Return all lines."""
        return "\n".join(self.args)
