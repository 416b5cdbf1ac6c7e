"""Errors for the user: each says what failed, with which value, and what to do next."""

AGAIN = "Download it again."  # what to do where a file is damaged


class FireRedError(Exception):
    """The base of every error that this pack raises on purpose."""


class CheckpointError(FireRedError):
    """A checkpoint folder that is missing, incomplete, truncated or of another model."""


class InputError(FireRedError, ValueError):
    """An image, latent, conditioning, size or prompt that cannot be used."""


class NonFiniteError(FireRedError):
    """NaN or infinity in a result. The picture would be black."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop, for use inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
