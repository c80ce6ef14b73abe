"""``HfArgumentParser``: command lines, dicts, JSON and YAML files into dataclasses, several at once."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainkit.trainer.secrets import text_without_secrets

_TRUE = ("yes", "true", "t", "y", "1")
_FALSE = ("no", "false", "f", "n", "0")


def string_to_bool(value: str | bool) -> bool:
    """A boolean from one of yes/no, true/false, t/f, y/n, 1/0 in any case.

    Raises: argparse.ArgumentTypeError for anything else.

    Example:
        >>> string_to_bool("Yes"), string_to_bool("0")
        (True, False)
    """
    if isinstance(value, bool):
        return value
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ArgumentTypeError(f"got {value!r}, expected one of yes/no, true/false, t/f, y/n, 1/0")


def HfArg(
    *,
    aliases: str | list[str] | None = None,
    help: str | None = None,
    default: Any = dataclasses.MISSING,
    default_factory: Any = dataclasses.MISSING,
    metadata: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A dataclass field with what the command line needs to know of it.

    Args:
        aliases: further options, such as "-o".
        help: the sentence that ``--help`` shows.
        default: as of ``dataclasses.field``.
        default_factory: as of ``dataclasses.field``.
        metadata: as of ``dataclasses.field``.
        **kwargs: as of ``dataclasses.field``.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     rows: int = HfArg(default=1, aliases="-r", help="Rows.")
        >>> HfArgumentParser(Options).parse_args_into_dataclasses(["-r", "3"])
        (Options(rows=3),)

    Source: transformers 4.57: ``HfArg``.
    """
    known = {"aliases": aliases, "help": help}
    merged = {**(metadata or {}), **{name: value for name, value in known.items() if value is not None}}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=merged, **kwargs)


class HfArgumentParser(ArgumentParser):
    """An ``argparse.ArgumentParser`` whose options are the fields of dataclasses, and which fills those.

    For a field ``a_b`` there are ``--a_b`` and ``--a-b``; for a boolean that is True by default also ``--no_a_b`` and
    ``--no-a-b``. ``metadata`` of a field may hold ``help``, ``choices``, ``metavar`` and ``aliases``.

    The type says how a text is read: booleans by word, enumerations and ``Literal`` by their values, lists from several
    words, dicts from a JSON object; ``X | None`` and ``X | str`` as X, but ``dict | str`` stays text, and one word for
    ``list | str`` too. Options that were added otherwise come back in a namespace. A class attribute
    ``_argument_group_name`` puts the options of a dataclass under that title.

    Args:
        dataclass_types: a dataclass or several, no two with a field of the same name.
        **kwargs: for ``argparse.ArgumentParser``.

    Raises: ValueError for a type that cannot be read from text, RuntimeError if annotations cannot be resolved.

    Example:
        >>> from trainkit.trainer.arguments import TrainingArguments
        >>> @dataclasses.dataclass
        ... class Model:
        ...     width: int = 8
        >>> parser = HfArgumentParser((Model, TrainingArguments))
        >>> model, args = parser.parse_args_into_dataclasses(
        ...     ["--width", "16", "--output_dir", "out", "--learning_rate", "1e-3", "--report_to", "none"])
        >>> model.width, args.learning_rate
        (16, 0.001)

    Source: transformers 4.57: ``HfArgumentParser``.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", ArgumentDefaultsHelpFormatter)
        super().__init__(**kwargs)
        given = [] if dataclass_types is None else dataclass_types
        # A dataclass may be iterable itself.
        alone = dataclasses.is_dataclass(given) or not isinstance(given, Iterable)
        self.dataclass_types: list[Any] = [given] if alone else list(given)
        for kind in self.dataclass_types:
            _add_dataclass(self, kind)

    def parse_args_into_dataclasses(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: str | None = None,
        args_file_flag: str | None = None,
    ) -> tuple[Any, ...]:
        """Parse a command line. What comes later wins: files, in order, then the command line.

        Args:
            args: the words; default those of the process.
            return_remaining_strings: give back the words that no option took, in place of an error.
            look_for_args_file: read the words of a file beside the script, of its name with the suffix ``.args``.
            args_filename: the file to read instead.
            args_file_flag: an option that names further files.

        Returns: the dataclasses in their order, a namespace if other options were added, and the remaining words if
            they were asked for.

        Raises: ValueError for words that no option took; SystemExit, as argparse does, for a value that does not fit.
        """
        words = list(sys.argv[1:] if args is None else args)
        files = [Path(args_filename)] if args_filename else []
        if look_for_args_file and not args_filename and sys.argv:
            files = [Path(sys.argv[0]).with_suffix(".args")]
        if args_file_flag:
            flags = ArgumentParser(add_help=False, allow_abbrev=False)
            flags.add_argument(args_file_flag, dest="files", action="append", default=[])
            found, words = flags.parse_known_args(words)
            files += map(Path, found.files)
        from_files = [word for file in files if file.is_file() for word in file.read_text(encoding="utf-8").split()]
        namespace, remaining = self.parse_known_args([*from_files, *words])
        outputs = [self._take(namespace, kind) for kind in self.dataclass_types]
        if vars(namespace):
            outputs.append(namespace)
        if return_remaining_strings:
            return (*outputs, remaining)
        if remaining:
            raise ValueError(f"command line: got {remaining}, which no option takes; --help shows the options")
        return tuple(outputs)

    @staticmethod
    def _take(namespace: Namespace, kind: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        return kind(**{name: vars(namespace).pop(name) for name in names})

    def parse_dict(self, args: Mapping[str, Any], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """Fill the dataclasses from values by name, as they are.

        Raises: ValueError for a name that no dataclass has, unless ``allow_extra_keys``; and as the dataclasses do.
        """
        names = [[field.name for field in dataclasses.fields(kind) if field.init] for kind in self.dataclass_types]
        unknown = sorted(set(args).difference(*names))
        if unknown and not allow_extra_keys:
            raise ValueError(f"got the unknown names {unknown}, expected fields of {self._type_names()}")
        return tuple(
            kind(**{name: args[name] for name in known if name in args})
            for kind, known in zip(self.dataclass_types, names, strict=True)
        )

    def _type_names(self) -> str:
        return ", ".join(kind.__name__ for kind in self.dataclass_types)

    def parse_json_file(self, json_file: str | Path, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """Fill the dataclasses from a JSON file; see :meth:`parse_dict`."""
        return self.parse_dict(json.loads(Path(json_file).read_text(encoding="utf-8")), allow_extra_keys)

    def parse_yaml_file(self, yaml_file: str | Path, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """Fill the dataclasses from a YAML file, where ``1e-4`` is a number; see :meth:`parse_dict`."""
        return self.parse_dict(_read_yaml(Path(yaml_file).read_text(encoding="utf-8")) or {}, allow_extra_keys)


def _read_yaml(text: str) -> Any:
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})

    # YAML 1.1, which PyYAML reads, asks for a dot and a sign in 1.0e-4; YAML 1.2 does not.
    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return yaml.load(text, loader)


def _add_dataclass(parser: ArgumentParser, kind: Any) -> None:
    try:
        hints = get_type_hints(kind)
    except NameError as error:
        raise RuntimeError(
            f"{kind.__name__}: its annotations cannot be resolved ({error}); define the class and what it names at the "
            "top level of a module"
        ) from error
    title = getattr(kind, "_argument_group_name", None)
    target: Any = parser if title is None else parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        if field.init:
            _add_field(target, field, hints[field.name])


def _add_field(target: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    known = {name: field.metadata[name] for name in ("help", "choices", "metavar") if name in field.metadata}
    aliases = field.metadata.get("aliases", [])
    aliases = [aliases] if isinstance(aliases, str) else aliases
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    options = {**known, **_reading(field.name, hint, default), "dest": field.name}
    if default is dataclasses.MISSING and "default" not in options:
        options["required"] = True
    elif default is not dataclasses.MISSING:
        options["default"] = default
    target.add_argument(*_flags("", field.name), *aliases, **options)
    if default is True and _without_none(hint) is bool:
        target.add_argument(
            *_flags("no_", field.name), action="store_false", default=False, dest=field.name, help=known.get("help")
        )


def _flags(prefix: str, name: str) -> list[str]:
    flag = f"--{prefix}{name}"
    return list(dict.fromkeys((flag, flag.replace("_", "-"))))


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union without None, or the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(hint) if kind is not type(None))
    return (hint,)


def _without_none(hint: Any) -> Any:
    members = _members(hint)
    return members[0] if len(members) == 1 else hint


def _reading(name: str, hint: Any, default: Any) -> dict[str, Any]:
    """How argparse reads a value of this type: ``type``, ``nargs``, ``choices``, ``const``."""
    members = _members(hint)
    beside_text = [kind for kind in members if kind is not str]
    if len(members) == 1 or len(beside_text) == 1:
        kind = beside_text[0] if beside_text else str
        return _reading_of(name, kind, default, or_text=str in members and kind is not str)
    if str in members:
        return {"type": str}
    raise ValueError(f"{name}: got a field of type {hint}, expected X, X | None, X | str or X | str | None")


def _reading_of(name: str, kind: Any, default: Any, or_text: bool) -> dict[str, Any]:
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        choices = get_args(kind) if get_origin(kind) is Literal else [member.value for member in kind]
        by_text = {str(choice): choice for choice in choices}
        return {"choices": choices, "type": lambda text: by_text.get(text, text)}
    if kind is bool:
        reading: dict[str, Any] = {"type": _bool_or_text if or_text else string_to_bool}
        if default is not None:
            reading |= {"nargs": "?", "const": True, "default": False}
        return reading
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, list):
        item = _item_type(name, kind)
        # Beside text, one word is that text.
        return {"type": str, "nargs": "+", "action": _OneOrMore} if or_text else {"type": item, "nargs": "+"}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": str if or_text else _json_object}
    return {"type": str if or_text or kind is Any else kind}


def _item_type(name: str, kind: Any) -> Callable[[str], Any]:
    item = _without_none((get_args(kind) or (str,))[0])
    if item is bool:
        return string_to_bool
    if not callable(item):
        raise ValueError(f"{name}: got a list of {item}, expected a list of a type that reads text")
    reader: Callable[[str], Any] = item
    return reader


def _bool_or_text(text: str) -> bool | str:
    return string_to_bool(text) if text.lower() in (*_TRUE, *_FALSE) else text


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"got {text_without_secrets(text)!r}, expected a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ArgumentTypeError(f"got {text_without_secrets(text)!r}, expected a JSON object")
    return content


class _OneOrMore(Action):
    """One word as it is, several as a list."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)
