"""Methods from outside the tree: installed ones by entry point, any by ``methods=[package.module:ENTRY]``.

A reference is typed by the user or comes from the user's own preset. That a run folder names a module is no reason to
import it: who opens the folder must have allowed it. Packages that are installed are trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from fedtailor.core.errors import ConfigError
from fedtailor.core.outside import import_object, module_of
from fedtailor.federated.method import MethodEntry
from fedtailor.methods import FILES, METHODS

GROUP = "fedtailor.methods"
"""Entry points of this group, ``name = package.module:ENTRY``, are methods."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
    """Lets run folders that are opened by this process name these modules."""
    _allowed.update(modules)


def installed() -> dict[str, str]:
    """Name to reference of the methods that installed packages bring."""
    return {found.name: found.value for found in entry_points(group=GROUP)}


def add_method(reference: str, key: str = "methods") -> MethodEntry:
    """Imports an entry and makes it a row of METHODS, after those that are there.

    Raises:
        ConfigError: see `import_object`; not a `MethodEntry`; or its name is another method's, or none.
    """
    entry = import_object(reference, key)
    if not isinstance(entry, MethodEntry):
        raise ConfigError(f"'{key}': '{reference}' is of type {type(entry).__name__}, not a MethodEntry")
    if not _NAME.fullmatch(entry.name):
        raise ConfigError(f"'{key}': '{reference}' has the name '{entry.name}'; write a-z, 0-9 and _ only")
    if METHODS.setdefault(entry.name, entry) is not entry:
        raise ConfigError(
            f"'{key}': '{reference}' has the name '{entry.name}', which is another method's; give its entry a name of "
            f"its own (taken: {', '.join(METHODS)})"
        )
    _allowed.add(module_of(reference))
    return entry


def add_stored(code: Mapping[str, str], run_id: str) -> None:
    """Adds the methods that a stored run names.

    Args:
        code: the run's ``code``, name to reference.
        run_id: for the message.

    Raises:
        ConfigError: neither installed nor allowed.
    """
    trusted = installed()
    refused = [
        f"run '{run_id}': its method '{name}' is code from outside, '{reference}'. A run folder may not import it by "
        f"itself; if you trust that module, add --allow-code {module_of(reference)}"
        for name, reference in code.items()
        if trusted.get(name) != reference and module_of(reference) not in _allowed
    ]
    if refused:
        raise ConfigError(refused)
    for reference in code.values():
        add_method(reference, "code")


def resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in which methods are named and ``code`` says where those from outside are.

    >>> resolved({"methods": ["base", "lora"], "seeds": [1]})
    {'methods': ['base', 'lora'], 'seeds': [1]}

    Args:
        tree: plain; ``methods`` and ``base.name`` may hold references, and names of installed methods.

    Raises:
        ConfigError: see `add_method`.
    """
    given = tree.get("code", {})
    code: dict[str, str] = dict(given) if isinstance(given, Mapping) else {}
    brought = installed()

    def named(word: Any, key: str) -> Any:
        if not isinstance(word, str) or (":" not in word and word not in brought):
            return word
        if word in brought and word in FILES:
            raise ConfigError(f"'{key}': '{word}' is a method of fedtailor and an installed one, '{brought[word]}'")
        reference = brought.get(word, word)
        name = add_method(reference, key).name
        if word in brought and name != word:
            raise ConfigError(f"'{key}': the entry point '{word}' leads to the method '{name}'; it needs that name")
        code[name] = reference
        return name

    found = dict(tree)
    if isinstance(found.get("methods"), list | tuple):
        found["methods"] = [named(word, "methods") for word in found["methods"]]
    base = found.get("base")
    if isinstance(base, Mapping) and "name" in base:
        found["base"] = {**base, "name": named(base["name"], "base.name")}
    elif isinstance(base, str):
        found["base"] = named(base, "base.name")
    for key in [key for key in found if key in brought and key not in FILES]:
        named(key, key)  # its section alone is given
    for name, reference in code.items():
        if add_method(reference, "code").name != name:
            raise ConfigError(f"'code.{name}': '{reference}' is the method '{METHODS[name].name}'")
    return {**found, "code": code} if code else found
