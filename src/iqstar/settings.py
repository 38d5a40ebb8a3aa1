"""Which settings a user gave and where, so that an error can point at them.

jsonargparse says what it rejects, but not at which key or line, nor what would be right there.
Here its complaint is looked up among the settings as written, and compared with the signature of
the class that stands at that place.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from iqstar.errors import InputError
from iqstar.signatures import classes_in, hints, parameters, public_path, subclasses

WRAPPERS = ("class_path", "init_args", "dict_kwargs")
_NUMBER = re.compile(r"-(\.?\d|inf)")
"""A value that begins as an option does."""
CONFIG_FLAGS = ("--config", "-c")
YAML_SUFFIXES = (".yaml", ".yml", ".json")
DATA_KEYS = ("path", "heldout_path", "cache", "output")
"""Keys whose files hold data, however they end."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key as written, with its value.

    Args:
        path: Its keys from the top; items of a list by number.
        value: The text of a scalar; empty for a mapping or a list.
        place: ``file:line``; empty for the command line.
    """

    path: tuple[str, ...]
    value: str
    place: str

    @property
    def key(self) -> str:
        """The path as it is written in messages."""
        return ".".join(self.path)

    @property
    def plain(self) -> tuple[str, ...]:
        """The path without ``init_args`` and the numbers of list items."""
        return tuple(k for k in self.path if k not in WRAPPERS and not k.isdigit())

    def said(self, problem: str) -> str:
        """The problem, with where it was met."""
        return f"{self.place}: {problem}" if self.place else f"--{self.key}: {problem}"


def read_settings(arguments: Sequence[str]) -> list[Setting]:
    """All settings of a command line and of the YAML files that it names, in order.

    Raises:
        InputError: If a config file is missing or no YAML mapping.
    """
    settings: list[Setting] = []
    for argument, following in pairwise([*arguments, ""]):
        flag, has_value, value = argument.partition("=")
        if not flag.startswith("-") or _NUMBER.match(flag):
            continue
        if not has_value:
            value = "" if following.startswith("--") else following
        if flag in CONFIG_FLAGS:
            if not value:
                raise InputError(f"{flag}: no file is given; write {flag} FILE")
            if not (file := Path(value).expanduser()).is_file():
                raise InputError(f"{flag}: {value} does not exist or is not a file")
            settings += read_yaml(file)
            continue
        path = tuple(flag.removeprefix("--").removesuffix("+").split("."))
        settings.append(Setting(path=path, value=value, place=""))
        with suppress(yaml.YAMLError):  # the parser will say so
            if value.startswith("{") and (node := yaml.compose(value, Loader=yaml.SafeLoader)):
                settings += _walk(node, path)
        if value.endswith(YAML_SUFFIXES) and path[-1] not in DATA_KEYS:
            if not (file := Path(value).expanduser()).is_file():
                if " " in value:
                    continue  # a text, such as a principle
                raise InputError(f"{flag}: {value} does not exist or is not a file")
            settings += read_yaml(file, path)
    return settings


def read_yaml(file: Path, prefix: tuple[str, ...] = ()) -> list[Setting]:
    """The settings of a YAML file, with their lines.

    Args:
        file: The file.
        prefix: The key that the file is the value of.

    Raises:
        InputError: If it is no YAML mapping; names the line.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(str(p) for p in (error.context, error.problem) if p)
        raise InputError(f"{file}:{line}: not valid YAML: {problem}; check its indentation "
                         "and quotes") from error  # fmt: skip
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read: {error}; give a YAML file") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{file}:1: not a mapping of keys to values; write lines such as key: 1")
    return list(_walk(root, prefix, file))


def _walk(node: yaml.Node, path: tuple[str, ...], file: Path | None = None) -> Iterator[Setting]:
    items: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        items = [(str(k.value), v, k.start_mark.line) for k, v in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(str(i), v, v.start_mark.line) for i, v in enumerate(node.value)]
    for key, value, line in items:
        text = value.value if isinstance(value, yaml.ScalarNode) else ""
        place = f"{file}:{line + 1}" if file else ""
        yield Setting(path=(*path, key), value=text, place=place)
        yield from _walk(value, (*path, key), file)


class Explainer:
    """Turns a parser's complaint into one line.

    Args:
        settings: What the user set.
        roots: Top-level key → the class that takes what is below it.
        keys: Every top-level key.
    """

    def __init__(
        self, settings: Sequence[Setting], roots: Mapping[str, type], keys: Sequence[str]
    ) -> None:
        self.settings = settings
        self.roots = roots
        self.keys = keys

    def explain(self, complaint: str) -> InputError:
        """What is wrong, where, and the nearest right thing.

        Args:
            complaint: A message of jsonargparse, of many lines.
        """
        lines = re.sub(r"\x1b\[[0-9;]*m", "", complaint).splitlines()
        # Whole configs, which hold anything.
        text = "\n".join(line for line in lines if not line.lstrip().startswith("Given value"))
        found = (
            self._unknown_key(text)
            or self._no_class_yet(text)
            or self._wrong_class(text)
            or self._missing(text)
            or self._wrong_type(text)
            or self._suspicious()
        )
        return InputError(found or _shortened(text))

    # Every method below returns None where the complaint is about something else.

    def _unknown_key(self, text: str) -> str | None:
        patterns = (
            r"Option '([^']+)' is not accepted",
            r"not accept option '([^']+)'",
            r"nrecognized arguments: -*([^\s=]+)",
        )
        name = next((m[1] for p in patterns if (m := re.search(p, text))), None)
        if name is None:
            return None
        ending = tuple(name.split("."))
        fitting = [s for s in self.settings if s.path[-len(ending) :] == ending]
        unknown = [s for s in fitting if s.path[-1] not in self.known(s.path[:-1])]
        if not (unknown or fitting):
            return f"{name}: not expected here; options start with -- (see iqstar fit --help)"
        setting = (unknown or fitting)[-1]
        return self._misspelt(setting)

    def _misspelt(self, setting: Setting) -> str:
        """Names the first key on the way that does not exist: in ``--modle.beta``, ``modle``."""
        for depth in range(1, len(setting.path) + 1):
            if not _follows(setting.path[depth - 1], self.known(setting.path[: depth - 1])):
                break
        wrong, parent = setting.path[depth - 1], setting.path[: depth - 1]
        known = self.known(parent)
        near = difflib.get_close_matches(wrong, known, n=1)
        if near:
            right = ".".join([*parent, near[0], *setting.path[depth:]])
            hint = f"did you mean {'' if setting.place else '--'}{right}?"
        elif parent and not self._has_class(parent):
            return setting.said(self._choices(parent))
        elif places := self._elsewhere(wrong):
            dashes = "" if setting.place else "--"
            hint = f"did you mean {' or '.join(dashes + place for place in places)}?"
        else:
            hint = f"known there: {', '.join(known)}" if known else "see iqstar fit --help"
        return setting.said(
            f"unknown key {setting.key}; {hint}" if setting.place else f"unknown option; {hint}"
        )

    def _no_class_yet(self, text: str) -> str | None:
        """A part whose class is not named, or not seen since its settings stand beside it."""
        before, found, _ = text.partition(" is abstract")
        place = self._nested(before)
        below = [s for s in self.settings if s.plain[:-1] == place and s.path[-1] not in WRAPPERS]
        if not (found and below):
            return None
        paths = {s.path for s in self.settings}
        for setting in below:
            *above, key = setting.path
            if (*above, "class_path") in paths:
                right = ".".join([*above, "init_args", key])
                return setting.said(
                    f"{setting.key} stands beside class_path; a class takes what is below "
                    f"init_args: {right}"
                )
        return below[-1].said(self._choices(place))

    def _has_class(self, path: tuple[str, ...]) -> bool:
        """Whether it is known which class stands at a place."""
        plain, bases = _plain(path), self.classes(path)
        named = any(setting.plain == plain and setting.value for setting in self.settings)
        return named or not bases or not all(map(inspect.isabstract, bases))

    def _choices(self, path: tuple[str, ...]) -> str:
        key = ".".join(_plain(path))
        names = sorted(public_path(c) for c in subclasses(self.classes(path)))
        return f"{key} has no class yet; name one first: --{key}, one of {', '.join(names)}"

    def _elsewhere(self, name: str) -> list[str]:
        """The places that have a setting of this name."""
        places = [(root,) for root in self.roots]
        parts = [(root, part) for root in ("model", "data") for part in self.known((root,))]
        found = [p for p in (*places, *parts) if self._has_class(p) and name in self.known(p)]
        return [".".join([*place, name]) for place in found]

    def _wrong_class(self, text: str) -> str | None:
        patterns = (
            r"class_path[ =]'([^']+)'",
            r"Import path (\S+) does not correspond",
            r"Expected a dot import path string: (\S+)",
            r"Unexpected import path format: (\S+)",
        )
        for match in (m for p in patterns for m in re.finditer(p, text)):
            for setting in reversed(self.settings):
                path = setting.path[:-1] if setting.path[-1] == "class_path" else setting.path
                bases = self.classes(path)
                if setting.value != match[1] or not (path != setting.path or bases):
                    continue
                named = self._named(match[1], bases)
                if named and (not bases or issubclass(named, tuple(bases))):
                    continue  # it is what stands below it that is wrong
                key = f"{'.'.join(path)}: " if setting.place else ""
                return setting.said(key + _no_class(match[1], bases))
        return None

    def _missing(self, text: str) -> str | None:
        match = re.search(r"arguments are required: ([\w., ]+)", text)
        if match is None:
            return None
        names = match[1].strip().split(", ")
        place = self._nested(text[: match.start()])
        parents = [s for s in self.settings if s.plain == place and s.path[-1] == place[-1]]
        if not place:
            names = [name.partition(".")[2] or name for name in names]  # fit.data
            return f"{', '.join(names)}: missing; set it in the config, or give --{names[0]}"
        above = parents[-1].path if parents else place
        cls = self.class_at(above)
        keys = [".".join([*above, "init_args", name]) for name in names]
        text = f"{cls.__name__ if cls else place[-1]} needs {', '.join(names)}; set {keys[0]}"
        where = next((s.place for s in reversed(parents) if s.place), "")
        return f"{where}: {text}" if where else f"{'.'.join(above)}: {text}"

    def _wrong_type(self, text: str) -> str | None:
        parts = re.split(r'Parser key "[\w.]+":', text)
        place = self._nested(text)
        if not place:
            return None
        fitting = [s for s in self.settings if s.plain == place]
        fitting = fitting or [s for s in self.settings if s.plain[-1:] == place[-1:]]
        expected = re.match(r"\s*Expected an? (.+?)\. Got value", parts[-1])
        union = re.search(r"Subtypes: [\[(](.*)[\])]", parts[-1])
        match = expected or union
        if not fitting or match is None:
            return None
        setting, kinds = fitting[-1], _kinds(match[1])
        given = setting.value or "a mapping or list"
        where = f"{setting.key}: " if setting.place else ""
        return setting.said(f"{where}{given!r} does not fit; expected {kinds}")

    def _suspicious(self) -> str | None:
        """A setting that looks wrong, where the complaint does not tell (files inside files)."""
        for setting in reversed(self.settings):
            above, key = setting.path[:-1], setting.path[-1]
            if key == "class_path" and (bases := self.classes(above)):
                named = self._named(setting.value, bases)
                if named is None or not issubclass(named, tuple(bases)):
                    return setting.said(f"{'.'.join(above)}: {_no_class(setting.value, bases)}")
            elif (known := self.known(above)) and not _follows(key, known):
                return self._misspelt(setting)
        return None

    def _nested(self, text: str) -> tuple[str, ...]:
        """The nested keys that a complaint names, outermost first."""
        keys = ".".join(re.findall(r'Parser key "([\w.]+)":', text)).split(".")
        return tuple(k for k in keys if k and k not in WRAPPERS)

    # What is right at a place.

    def known(self, path: tuple[str, ...]) -> list[str]:
        """The keys that may stand below a place."""
        if not path:
            return list(self.keys)
        cls = self.class_at(path)
        return [] if cls is None else parameters(cls)

    def class_at(self, path: tuple[str, ...]) -> type | None:
        """The class whose arguments stand below a place: the one named there, or the default."""
        plain = _plain(path)
        for setting in reversed(self.settings):
            named = setting.path[-1] == "class_path" and setting.plain == plain
            if (named or (setting.plain == plain and setting.value)) and (
                cls := self._named(setting.value, self.classes(path))
            ):
                return cls
        return next(iter([b for b in self.classes(path) if not inspect.isabstract(b)]), None) or (
            next(iter(subclasses(self.classes(path))), None)
        )

    def classes(self, path: tuple[str, ...]) -> list[type]:
        """The classes that the type of a place allows (their subclasses are allowed too)."""
        plain = _plain(path)
        if len(plain) == 1:
            return [self.roots[plain[0]]] if plain[0] in self.roots else []
        owner = self.class_at(plain[:-1]) if plain else None
        return [] if owner is None else classes_in(hints(owner).get(plain[-1]))

    def _named(self, name: str, bases: Sequence[type]) -> type | None:
        """A class by its import path, or by its name alone."""
        module, _, attribute = name.rpartition(".")
        if not module:
            return next((c for c in subclasses(bases) if c.__name__ == name), None)
        try:
            found = getattr(import_module(module), attribute, None)
        except Exception:  # whatever a module of the user's own ends in
            return None
        return found if inspect.isclass(found) else None


def _kinds(types: str) -> str:
    """A parser's list of types, for people: types, and the words that may stand for them."""
    lists = re.findall(r"Literal\[([^]]*)\]", types)
    words = {word.strip("'"): word for text in lists for word in text.split(", ")}
    others = re.sub(r"(?:\w+\.)*Literal\[[^]]*\]", "", types)
    others = re.sub(r"<class '([\w.]+)'>", r"\1", others).replace("NoneType", "null")
    others = re.sub(r"\b(?:\w+\.)+(?=\w)", "", others)
    plain = [part for part in others.split(", ") if part]
    if not words:
        return " or ".join(plain)
    listed = ", ".join(words.values())
    if plain in ([], ["null"]):
        return " or ".join([f"one of {listed}", *plain])
    return " or ".join([plain[0], listed, *plain[1:]])


def _plain(path: Sequence[str]) -> tuple[str, ...]:
    return Setting(path=tuple(path), value="", place="").plain


def _follows(key: str, known: Sequence[str]) -> bool:
    return key in known or key in WRAPPERS or key.isdigit()


def _no_class(name: str, bases: Sequence[type]) -> str:
    """What to say of a class path that names no fitting class."""
    choices = {cls.__name__: public_path(cls) for cls in reversed(subclasses(bases))}
    module, _, last = name.rpartition(".")
    names, without = dict[str, Any](), ""
    try:
        names = vars(import_module(module)) if module else names
    except Exception as error:  # whatever a module of the user's own ends in
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not f"{module}.".startswith(f"{missing}."):
            return f"{name} cannot be imported ({error}); mend its file or install what it needs"
        without = f" (there is no module {module})"
    choices = choices or {n: f"{module}.{n}" for n, c in names.items() if inspect.isclass(c)}
    near = difflib.get_close_matches(last, choices, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {choices[near[0]]}?"
    else:
        own = [c for c in choices.values() if c.startswith("iqstar.")]
        hint = f"choose one of {', '.join(own or choices.values()) or 'the installed ones'}"
    return f"{name} is no class that fits here{without}; {hint}"


def _shortened(text: str) -> str:
    """A complaint of unknown form without the parser's inner workings."""
    noise = ("Subtypes:", "Errors:", "Given value", "Does not validate", "- Expected a <class 'No")
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(noise))
