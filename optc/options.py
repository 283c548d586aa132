"""Options of passes and backends: typed fields of a pydantic model, given by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from optc.errors import OptcError, UnknownNameError


class Options(BaseModel):
    """Base of typed options: frozen, unknown names refused. ``Field(description=…)`` documents each."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Kind = TypeVar("Kind", bound=Options)


def described(kind: type[Options]) -> dict[str, dict[str, Any]]:
    """By name of an option its type, default and description, ready for JSON."""
    return {
        name: {
            "type": _in_words(field.annotation),
            "default": field.default,
            "description": field.description or "",
        }
        for name, field in kind.model_fields.items()
    }


def _in_words(annotation: Any) -> str:
    """A type as what may be written: ``int``, or the values one of which it is."""
    if get_origin(annotation) is Annotated:
        return _in_words(get_args(annotation)[0])
    if get_args(annotation):
        return ", ".join("not given" if each is type(None) else _in_words(each) for each in get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def checked(kind: type[Kind], given: Mapping[str, Any], of: str, listed_by: str) -> Kind:
    """The options, those not given at their defaults.

    Args:
        of: whose they are, such as ``"pass quant"``.
        listed_by: the command that lists them.

    Raises:
        UnknownNameError: there is no option of that name.
        OptcError: a value does not fit its type. One line for the first thing wrong.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
    option = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = sorted(kind.model_fields)
        hint = f"it takes {', '.join(known)}" if known else "it takes no options"
        raise UnknownNameError(f"option of {of}", option, known, hint=hint)
    name = of.rpartition(" ")[2]
    raise OptcError(f"option {name}.{option}={first['input']!r}: {first['msg']}", f"see '{listed_by}'")


def options_text(options: Mapping[str, Any]) -> str:
    """Options as tables show them, such as ``"streams=2"``."""
    return " ".join(f"{name}={value}" for name, value in options.items())
