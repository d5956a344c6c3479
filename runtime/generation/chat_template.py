"""Chat templates as transformers expands them, within limits, because a template comes with a model.

The same environment as `transformers.utils.chat_template_utils`: sandboxed, with loop controls,
`raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, and `{% generation %}` blocks, which
mark what an assistant has said for training and change no text. `tools` and `documents` are None if there
are none; a special token that the tokenizer lacks is undefined.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from hotcold.errors import UnsupportedError

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]

_MAX_TEMPLATE = 1 << 18  # characters of a chat template
_MAX_CHAT = 1 << 22  # characters that one may expand to


def render(template: str, **variables: object) -> str:
    """Expand a chat template. UnsupportedError if it fails, or if it or its output is too long."""
    from jinja2 import TemplateError

    if len(template) > _MAX_TEMPLATE:
        raise UnsupportedError(
            "chat template too long", got=len(template), expected=f"at most {_MAX_TEMPLATE}"
        )
    variables = {"tools": None, "documents": None, "add_generation_prompt": True} | variables
    failures = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
    try:
        return _bounded(_environment().from_string(template).generate(**variables))
    except (*failures, AttributeError) as error:
        raise UnsupportedError(f"the chat template fails: {error}", fix="drop --chat") from error


def _environment() -> Environment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` is what stands in it."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 wants it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, as transformers makes: what is set in it does not get out.
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own escapes what HTML would take for markup."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _bounded(pieces: Iterable[str]) -> str:
    text: list[str] = []
    length = 0
    for piece in pieces:
        text.append(piece)
        length += len(piece)
        if length > _MAX_CHAT:
            raise UnsupportedError(
                "the chat template produces too much text", expected=f"{_MAX_CHAT} characters"
            )
    return "".join(text)
