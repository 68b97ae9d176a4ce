"""Keeps secrets out of everything that is written: by the name of a key, and by value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_IF_TEXT = {"key", "keys", "token", "tokens"}
_KNOWN = re.compile(r"\b(?:wandb_v\d_|hf_|gh[opsu]_)\w{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
"""Keys that are recognised by their form: W&B, Hugging Face, GitHub, AWS (its ids; its secrets have no form)."""
_USER_INFO = re.compile(r"(?<=://)[^/@:\s]+(?::[^@\s]*)?(?=@)")
_ASSIGNED = re.compile(r"([\w.\-]+)=([^\s,;&'\"]+)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def redact(tree: Any) -> Any:
    """A copy of a JSON-like tree without secrets.

    Hidden are texts under a key with the word key or token, any value under one with secret, password or
    the like, ``name=value`` words and ``{"key": name, "value": ...}`` entries for such names, user names
    and passwords in URLs, keys of a known form, and the values that such environment variables have now,
    wherever they occur.

    >>> redact({"wandb": {"api_key": "abc"}, "engine": {"token_budget": 64}, "overrides": ["a.token=x"]})
    {'wandb': {'api_key': '***'}, 'engine': {'token_budget': 64}, 'overrides': ['a.token=***']}
    """
    if isinstance(tree, Mapping):
        named = str(tree["key"]) if set(tree) == {"key", "default", "value"} else None
        return {key: _entry(str(key) if named is None else named, key, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(item) for item in tree]
    return scrub(tree) if isinstance(tree, str) else tree


def scrub(text: str) -> str:
    """A text without the secrets of the environment, keys of known form, ``key=secret`` and passwords in URLs."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return _KNOWN.sub(HIDDEN, _USER_INFO.sub(HIDDEN, _ASSIGNED.sub(_hide_assigned, text)))


def _hide_assigned(found: re.Match[str]) -> str:
    name, value = found.groups()
    return f"{name}={HIDDEN}" if _hides(name, value) and not value.isdecimal() else found.group()


def _entry(name: str, key: Any, value: Any) -> Any:
    if key == "key" and name != "key":
        return value
    if isinstance(value, Mapping | list | tuple) and value and _hides(name, ""):
        return _blank(value)
    return HIDDEN if _hides(name, value) else redact(value)


def _hides(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    words = {word.lower() for word in _WORDS.findall(name.rpartition(".")[2])}
    return bool(words & _ALWAYS) or (isinstance(value, str) and bool(words & _IF_TEXT))


def _blank(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_blank(item) for item in value]
    return HIDDEN if isinstance(value, str) else value


def _environment_secrets() -> list[str]:
    # Short values are no secrets, and hiding them would garble every text.
    found = {value for name, value in os.environ.items() if len(value) >= 8 and _hides(name, value)}
    return sorted(found, key=len, reverse=True)
