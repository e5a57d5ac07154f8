"""Whether a grammar can be obeyed, by llguidance (the extra `grammar`)."""

from __future__ import annotations

import json

from engine.errors import InvalidRequest
from engine.params import Grammar

try:
    from llguidance import LLMatcher
except ModuleNotFoundError:
    INSTALLED = False
else:
    INSTALLED = True


def check(grammar: Grammar) -> None:
    """Raises InvalidRequest where no output could obey it, or llguidance is not installed."""
    field = grammar.field
    if not INSTALLED:
        raise InvalidRequest(
            f"{field} needs llguidance, which this server lacks: pip install 'ropeway[grammar]'",
            field,
        )
    try:
        fault = LLMatcher.validate_grammar(source(grammar))
    except ValueError as error:
        fault = str(error)
    if fault:
        said = " ".join(fault.split())
        raise InvalidRequest(f"{field} cannot be obeyed: {said}", field)


def source(grammar: Grammar) -> str:
    """As llguidance reads it. Raises ValueError."""
    if grammar.kind == "json_schema":
        # Small models would fill a line with spaces, where any number of them may stand.
        return LLMatcher.grammar_from_json_schema(
            grammar.text, overrides={"whitespace_flexible": False}
        )
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    texts = json.loads(grammar.text)
    return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, texts))}")
