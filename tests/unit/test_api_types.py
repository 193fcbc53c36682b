"""What is read from a gateway's answers."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_plugin.api_types import chat_text
from gateway_plugin.errors import NothingSaid


def answer(ended: str, **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": ended, "message": {"role": "assistant", **message}}]}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"content": None, "reasoning": "Hm"}, "while the model was thinking"),
        ({"content": "", "reasoning_content": "Hm"}, "while the model was thinking"),
        ({"content": None, "tool_calls": []}, "before the model said anything"),
        ({}, "before the model said anything"),
        ({"content": "\n\n", "reasoning": "Hm"}, "while the model was thinking"),
    ],
)
def test_a_choice_that_ended_before_its_first_word_is_an_error(message: dict[str, Any], says: str) -> None:
    with pytest.raises(NothingSaid, match=says) as caught:
        chat_text(answer("length", **message))
    assert "raise max_tokens" in caught.value.message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (answer("length", content="half an ans", reasoning="Hm"), "half an ans"),
        (answer("stop", content=None), ""),
        (answer("stop", content=" \n"), " \n"),
        (answer("function_call", content=None, function_call={"name": "f"}, reasoning="Hm"), ""),
        (answer("length", content=None, tool_calls=[{"id": "1"}]), ""),
        (answer("tool_calls", content=None, tool_calls=[{"id": "1"}]), ""),
    ],
)
def test_any_other_choice_has_its_words(given: dict[str, Any], words: str) -> None:
    assert chat_text(given) == words


@pytest.mark.parametrize("message", [{"content": None, "reasoning": "Hm"}, {"content": " ", "reasoning_content": "Hm"}])
def test_thoughts_alone_are_no_answer(message: dict[str, Any]) -> None:
    with pytest.raises(NothingSaid, match=r"thought and then said nothing: .*--reasoning-parser"):
        chat_text(answer("stop", **message))
