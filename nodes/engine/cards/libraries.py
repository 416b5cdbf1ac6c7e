"""Check that the libraries the nodes use are installed, new enough, and can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys

import torch

from ..errors import FireRedError
from .kernels import install_line

# The oldest releases that pass the tests (`run.py test --libraries oldest`). requirements.txt asks for the
# same, but allows any torch: pip must not replace the torch that ComfyUI uses.
OLDEST = {
    "torch": "2.6",
    "diffusers": "0.37",
    "transformers": "4.57",
    "accelerate": "1.10",
    "gguf": "0.17",
    "bitsandbytes": "0.46",
}
# What every component uses of each library. transformers' image processor uses torchvision.
REQUIRED: dict[str, tuple[str, ...]] = {
    "torch": (),
    "torchvision": (),
    "diffusers": ("AutoencoderKLQwenImage", "FlowMatchEulerDiscreteScheduler", "QwenImageTransformer2DModel"),
    "transformers": ("Qwen2_5_VLModel", "Qwen2VLProcessor"),
    "accelerate": ("init_empty_weights",),
}
OPTIONAL = {"bitsandbytes": "nf4 and int8-bnb", "gguf": ".gguf files"}  # and what needs it
TORCH_LIBRARIES = ("torch", "torchvision")  # must come from the same index


def startup_warning() -> str | None:
    """A log line about libraries that are missing or too old; None if there are none. Imports nothing."""
    missing = {name: text for name in (*REQUIRED, *OPTIONAL) if (text := _shortcoming(name))}
    for name, users in OPTIONAL.items():
        if name in missing:
            missing[name] += f" (only {users} use it)"
    return f"{'; '.join(missing.values())}. {_install(*missing)}" if missing else None


def require_libraries(*names: str) -> None:
    """Import these libraries, or those that every component needs.

    Raises FireRedError with the release needed, the one found, and the command that installs it.
    """
    wanted = names or tuple(REQUIRED)
    missing = {name: text for name in wanted if (text := _shortcoming(name))}
    if missing:
        raise FireRedError(f"{'; '.join(missing.values())}. {_install(*missing)}")
    for name in wanted:
        try:
            library = importlib.import_module(name)
            for used in REQUIRED.get(name, ()):
                getattr(library, used)
        except Exception as error:  # broken builds raise many types
            cause = _first_cause(error)
            said = f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"
            raise FireRedError(
                f"{name} {_version(name)} is here, but it cannot be imported ({said}). "
                f"{_install(name, options=_repair(cause))}"
            ) from error


def _shortcoming(name: str) -> str | None:
    """What is wrong with a library's version: it is missing or too old. None if it is good."""
    oldest, found = OLDEST.get(name), _version(name)
    needed = f"{name} {oldest} or later is needed" if oldest else f"{name} is needed"
    if found is None:
        return f"{needed}, none is installed"
    if oldest and _numbers(found) and _numbers(found) < _numbers(oldest):
        return f"{needed}, {found} is here"
    return None


def _version(name: str) -> str | None:
    """The version of the library that an import would find; None if there is none."""
    loaded = getattr(sys.modules.get(name), "__version__", None)
    if loaded:
        return str(loaded)
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.metadata.version(name) or "of an unknown version"
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "of an unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version: (2, 7) for "2.7.1+cu126"."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:2]))


def _repair(cause: BaseException) -> str:
    """The options of pip that repair a library with this error at its import."""
    # An ImportError comes from a dependency. A plain install brings that to the right version.
    return "" if isinstance(cause, ImportError) else "--force-reinstall --no-deps "


def _install(*names: str, options: str = "") -> str:
    """The command that installs these libraries for this Python."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    commands = []
    if "torch" in names:
        commands.append(_install_torch(python))
    elif "torchvision" in names:
        commands.append(f"{python} -m pip install {_torchvision_for(torch.__version__)}")
    if wanted := [f'"{name}>={OLDEST[name]}"' for name in names if name not in TORCH_LIBRARIES]:
        commands.append(f"{python} -m pip install {options}{' '.join(wanted)}")
    return f"Install with: {' and then: '.join(commands)} and restart ComfyUI."


def _install_torch(python: str) -> str:
    """The install command for the newest torch with kernels for all cards that an older torch may use."""
    if torch.version.hip or getattr(torch.version, "xpu", None):
        return "the newest build for your card from https://pytorch.org/get-started/locally"
    return f"{python} -m {install_line('sm_60')}"


def _torchvision_for(version: str) -> str:
    """The release of torchvision for a torch version: 0.26 for 2.11, 0.15 for 2.0."""
    major, minor = _numbers(version)
    return f'"torchvision==0.{minor + 15}.*"' if major == 2 else "torchvision"


def _first_cause(error: BaseException) -> BaseException:
    """The first error of a chain: diffusers and transformers raise their own from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
