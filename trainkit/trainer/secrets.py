"""What is given to a run and written nowhere: tokens, keys and passwords, by the names they have and the URLs they are
in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

# Not every name that ends in token: `pad_token` is a word of a vocabulary.
_NAMES = (
    r"(?:[a-z0-9]+[_-])*(?:(?:access|api|auth|bearer|gh|github|gitlab|hf|hub|refresh|secret|security|session|user|wandb)[_-]?tokens?"
    r"|(?:access|account|api|private|secret)[_-]?keys?|passw(?:or)?d|pwd|passphrase|secrets?|credentials?|authorization)"
    r"|token"
)
_NAME = re.compile(_NAMES, re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://)[^/?#\s\"']+@", re.IGNORECASE)
_IN_QUERY = re.compile(rf"([?&#](?:{_NAMES}|(?:[a-z]+-)*sig(?:nature)?)=)[^&#\s\"']+", re.IGNORECASE)
_IN_JSON = re.compile(rf"(([\"'])(?:{_NAMES})\2\s*:\s*)([\"'])(?:\\.|(?!\3).)*(?:\3|$)", re.IGNORECASE)
_HIDDEN = "<HIDDEN>"


def hidden(name: str) -> str:
    """What stands for a secret of this name where arguments are written down."""
    return f"<{name.upper()}>"


def is_secret(name: str) -> bool:
    """Whether a text of this name is a secret.

    Example:
        >>> list(filter(is_secret, ["token", "auth_token", "wandb_api_key", "password", "pad_token", "seed"]))
        ['token', 'auth_token', 'wandb_api_key', 'password']
    """
    return _NAME.fullmatch(name) is not None


def without_secrets(value: Any, name: str = "") -> Any:
    """A value to be written down: texts with the name of a secret hidden, at any depth, and those in URLs.

    What holds no secret is equal to what was given, which is not changed.

    Args:
        value: mappings, lists, tuples and texts are looked through.
        name: of the value.

    Example:
        >>> without_secrets({"url": "https://user:pass@host/x?token=abc&a=1", "tracker": {"api_key": "abc"}})
        {'url': 'https://<HIDDEN>@host/x?token=<HIDDEN>&a=1', 'tracker': {'api_key': '<API_KEY>'}}
    """
    if isinstance(value, str) and not isinstance(value, Enum):
        return hidden(name) if is_secret(name) else text_without_secrets(value)
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_secrets(item, name) for item in value)
    return value


def text_without_secrets(text: str) -> str:
    """A text in which URLs and pieces of JSON may be, without the secrets in them.

    Example:
        >>> text_without_secrets('got {"api_key": "abc", and https://abc@host')
        'got {"api_key": "<HIDDEN>", and https://<HIDDEN>@host'
    """
    text = _IN_QUERY.sub(rf"\1{_HIDDEN}", _IN_URL.sub(rf"\1{_HIDDEN}@", text))
    return _IN_JSON.sub(rf"\1\3{_HIDDEN}\3", text)
