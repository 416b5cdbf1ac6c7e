"""Errors for the person at the graph: what failed, with which value, and the one thing to do next."""


class FireRedError(Exception):
    """Base of every error this pack raises on purpose."""


class CheckpointError(FireRedError):
    """A checkpoint folder that is missing, incomplete, truncated or of another model."""


class InputError(FireRedError, ValueError):
    """An image, latent, conditioning, size or prompt that cannot be used."""


class NonFiniteError(FireRedError):
    """NaN or infinity where a black image would have come out."""


def first_line(error: BaseException) -> str:
    """What a library said, without its traces and hints, to stand inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
