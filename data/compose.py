"""Hydra's Compose API into a dataclass, with every fault as one line.

Defaults come from the dataclass, then conf/data/NAME.yaml, then `key=value` arguments. Hydra accepts a stray `+key=1`
even on a structured node, so the result is merged once more into the bare schema, which refuses it. An entry of a dict
of dataclasses it makes only as a whole (`+sources={new: {...}}`); here `+sources.new.path=...` makes one too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from data.errors import DataError, UsageError

T = TypeVar("T")
CONF = Path(__file__).resolve().parent.parent / "conf" / "data"


def compose_dataclass(schema: type[T], config_name: str | None, overrides: Sequence[str], conf: Path = CONF) -> T:
    """`schema` filled from conf/`config_name`.yaml (None: from nothing) and `overrides`, as real dataclasses.

    Errors: UsageError naming the key, with the nearest known one; DataError for a key given twice in the YAML.
    """
    defaults = ["bireme_schema", *([config_name] if config_name else []), "_self_"]
    store = ConfigStore.instance()
    store.store(name="bireme_schema", node=schema)
    store.store(name="bireme_root", node={"defaults": defaults})
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf)):
            composed = compose("bireme_root", overrides=_with_entries(overrides, schema))
        bare = OmegaConf.to_container(composed, resolve=False)
        merged = OmegaConf.merge(OmegaConf.structured(schema), bare)
        OmegaConf.resolve(merged)
        filled = OmegaConf.to_object(merged)
    except MissingConfigException as error:
        raise UsageError(_missing(error, config_name, conf)) from None
    except MissingMandatoryValue as error:
        raise UsageError(f"key '{error.full_key}' has no value; give it as {error.full_key}=VALUE") from None
    except (HydraException, OmegaConfBaseException) as error:
        groups = [path.name for path in conf.iterdir() if path.is_dir()]
        raise UsageError(_explain(error, schema, groups)) from None
    except YAMLError as error:
        fault = f"{conf / f'{config_name}.yaml'}: {_yaml_fault(error)}"
        raise (DataError if "duplicate key" in fault else UsageError)(fault) from None
    assert isinstance(filled, schema)
    return filled


def _with_entries(overrides: Sequence[str], schema: type) -> list[str]:
    """Each `+` of a key inside an entry of a dict of dataclasses as what Hydra takes: the entry, then the key without
    its plus. The entry is an empty one, which changes nothing where it is there already.
    """
    expanded = []
    for override in overrides:
        match = re.match(r"\+{1,2}([^=@]+)=", override)
        places = _dict_places(match[1].split("."), schema) if match else []
        entries = [(at, name) for at, name, entry in places if is_dataclass(entry)]
        expanded += [f"+{at}={{{name}: {{}}}}" for at, name in entries]
        expanded.append(override.lstrip("+") if entries else override)
    return expanded


def _dict_places(parts: Sequence[str], schema: Any) -> list[tuple[str, str, Any]]:
    """(dict's key, name in it, type of the entry) of every dict that a dotted key leads through."""
    places: list[tuple[str, str, Any]] = []
    kind = schema
    for number, part in enumerate(parts):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            places.append((".".join(parts[:number]), part, kind))
        else:
            kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return places


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the nearest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def schema_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every key of a dataclass; `*` stands for the free level of a dict or list of dataclasses."""
    keys = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        keys.append(prefix + item.name)
        inner, level = hints[item.name], ""
        if get_origin(inner) in (dict, list):
            inner, level = get_args(inner)[-1], "*."
        if is_dataclass(inner):
            keys += schema_keys(inner, f"{prefix}{item.name}.{level}")  # type: ignore[arg-type]
    return keys


def _missing(error: MissingConfigException, config_name: str | None, conf: Path) -> str:
    """A file or a choice of a group that does not exist: which group, what was given, what there is."""
    given = str(error.missing_cfg_file or config_name)
    group, _, choice = given.rpartition("/")
    names = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    what = f"{group}={choice}: no such {group}" if group else f"no configuration '{choice}' in {conf}"
    return f"{what}{nearest(choice, names)}; allowed: {', '.join(names)}"


def _explain(error: Exception, schema: type, groups: Sequence[str]) -> str:
    key = _unknown_key(error)
    if key is None:
        return f"configuration: {_line(_root(error))}"
    known = [*schema_keys(schema), *groups]
    if key in known:
        return f"key '{key}' is a map: add to it with a + in front, '+{key}={{KEY: VALUE}}'"
    parent, _, last = key.rpartition(".")
    # An element of a list is merged on its own, so that its key comes without the list's name.
    if not parent and (owner := re.search(r"not in '(\w+)'", str(_root(error)))) and owner[1] != schema.__name__:
        parent = next((at for at, name in _places(schema) if name == owner[1]), "")
        key = f"{parent}.{last}"
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    if (absent := _absent_entry(key, schema, known)) is not None:
        return absent
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if close:
        hint = f"; did you mean '{key.removesuffix(last)}{close[0]}'?"
    elif siblings and parent:
        hint = nearest(last, {name.rpartition(".")[2] for name in known})
    else:
        hint = nearest(key, known) or nearest(last, {name.rpartition(".")[2] for name in known})
    allowed = f"; allowed here: {', '.join(siblings)}" if siblings and not hint else ""
    return f"unknown key '{key}'{hint}{allowed}"


def _absent_entry(key: str, schema: type, known: Sequence[str]) -> str | None:
    """What to write where all that is wrong with a key is that the dict it leads through has no such entry yet."""
    parts = key.split(".")
    for at, name, _ in _dict_places(parts, schema)[:1]:
        rest = parts[len(at.split(".")) + 1 :]
        if not rest or ".".join([at, "*", *rest]) in known:
            return f"'{key}': {at} holds no '{name}'; to add it, put a plus before the key: +{key}=..."
    return None


def _places(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """(where, class name) of every dataclass that is an element of a list."""
    found = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        inner, at = hints[item.name], prefix + item.name
        if get_origin(inner) is list:
            inner, at = get_args(inner)[0], f"{at}.*"
            if is_dataclass(inner):
                found.append((at, inner.__name__))  # type: ignore[union-attr]
        if is_dataclass(inner):
            found += _places(inner, f"{at}.")  # type: ignore[arg-type]
    return found


def _unknown_key(error: BaseException | None) -> str | None:
    while error is not None:
        text = str(error)
        if "not in" in text and (match := re.search(r"full_key: (\S+)", text)):
            return match.group(1)
        if "not in" in str(_root(error)) and (match := re.search(r"Could not override '([^']+)'", text)):
            return match.group(1)
        error = error.__cause__
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type", "reference_type", "See http"))]
    return "; ".join(kept[:3])


def _yaml_fault(error: Any) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem}" + (f" (line {mark.line + 1})" if mark else "")
