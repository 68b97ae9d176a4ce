"""Objects from the user's own packages, named as ``package.module:NAME``; Ray takes these packages to its workers."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from fedtailor.core.errors import ConfigError

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_packages: dict[str, tuple[Path, ...]] = {}


def module_of(reference: str) -> str:
    """The module of a reference.

    >>> module_of("mypkg.mymethod:ENTRY")
    'mypkg.mymethod'
    """
    return reference.partition(":")[0]


def import_object(reference: str, key: str) -> Any:
    """Imports what a reference names; whatever the module itself raises comes through as it is.

    Args:
        reference: ``package.module:NAME``.
        key: key of the configuration, for messages.

    Raises:
        ConfigError: not a reference, no such module, or nothing of this name in it.
    """
    if not _REFERENCE.fullmatch(reference):
        raise ConfigError(f"'{key}': '{reference}' is no reference; write package.module:NAME")
    module, _, name = reference.partition(":")
    try:
        content = import_module(module)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if module == missing or module.startswith(f"{missing}."):
            way_out = "install its package, or put the folder that holds it on PYTHONPATH (PYTHONPATH=.)"
            raise ConfigError(f"'{key}': there is no module '{missing}' for '{reference}'; {way_out}") from error
        raise ConfigError(f"'{key}': '{reference}' needs the module '{missing}': install it") from error
    if not hasattr(content, name):
        given = ", ".join(known for known in vars(content) if known.isupper()) or "no constant"
        raise ConfigError(f"'{key}': module {module} has no '{name}' for '{reference}' (it has: {given})")
    top = import_module(module.partition(".")[0])
    places = list(getattr(top, "__path__", ())) or [getattr(top, "__file__", None)]  # a notebook has none
    _packages[top.__name__] = tuple(Path(place).resolve() for place in places if place)
    return getattr(content, name)


def packages() -> tuple[Path, ...]:
    """Folders (or files, of single modules) of the packages that `import_object` has imported from."""
    return tuple(place for places in _packages.values() for place in places)
