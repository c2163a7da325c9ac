"""What `nvamp compare` does: the same model from the same seeds under several losses, and what came of it."""


class StudyError(Exception):
    """A mistake in what the user asked for. The message is one line, fit for the terminal."""
