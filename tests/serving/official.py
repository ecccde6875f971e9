"""The official Python client: what its tests ask, and how they compare answers."""

from typing import Annotated, Any, Literal

import pytest
from openai import OpenAI
from openai.types import Completion
from pydantic import BaseModel, Field

from tests.inference.small import LETTERS

BIAS: dict[str, int] = {str(token): round(value) for token, value in LETTERS.items()}  # only letters are written
QUESTION: list[Any] = [{"role": "user", "content": "Which dragon hatched?"}]

Dialect = Literal["completions", "chat"]


class Egg(BaseModel):
    """An answer that even an untrained model comes to the end of."""

    colour: Literal["red", "green"]
    hatched: bool
    names: Annotated[list[Annotated[str, Field(pattern=r"^[a-z]{1,4}$")]], Field(max_length=2)]
    weight: Annotated[int, Field(ge=1, le=9)]


def complete(client: OpenAI, prompt: Any = "The dragon", **more: Any) -> Completion:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 8, "seed": 5, **more})


def texts(completion: Completion) -> list[str]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def assert_alike(one: Any, other: Any) -> None:
    """The same JSON, but for the last digits of numbers, which depend on what else was in the batch."""
    assert type(one) is type(other)
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_alike(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for this, that in zip(one, other, strict=True):
            assert_alike(this, that)
    else:
        assert one == other
