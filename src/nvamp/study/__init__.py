"""What `nvamp compare` and `nvamp inspect` do: train a model under several losses, and look at its tokens."""


class StudyError(Exception):
    """A mistake in what the user asked for. The message is one line that the terminal can show."""
