"""The header that names a request's model, which the client sets itself: the gateway's edge reads only the beginning of
a long body and no form at all, and what it cannot route takes the slower way through the ingress.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

MODEL_HEADER = "x-gateway-model"
NAME = re.compile(r"(?=[0-9._/:@+-]*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}")
"""As the catalog's, whose import takes YAML; a test holds them equal."""


def model_header(body: object) -> dict[str, str]:
    """The header for a request's body; none where it names no model that there could be: its error comes from there."""
    model = body.get("model") if isinstance(body, Mapping) else None
    return {MODEL_HEADER: model} if isinstance(model, str) and NAME.fullmatch(model) else {}


def _headers(options: Any) -> dict[str, str]:
    """``options``: openai's ``FinalRequestOptions``, whose ``json_data`` is also a form's fields."""
    given = options.headers if isinstance(options.headers, Mapping) else {}
    if any(name.lower() == MODEL_HEADER for name in given):
        return dict(given)
    return {**model_header(options.json_data), **given}


def naming_client(**options: Any) -> OpenAI:
    """An ``OpenAI`` whose requests name their model in the header, unless their caller does."""
    from openai import OpenAI

    class NamingOpenAI(OpenAI):
        def _prepare_options(self, options: Any) -> Any:
            options = super()._prepare_options(options)
            options.headers = _headers(options)
            return options

    return NamingOpenAI(**options)


def naming_async_client(**options: Any) -> AsyncOpenAI:
    """The same for ``asyncio``."""
    from openai import AsyncOpenAI

    class NamingAsyncOpenAI(AsyncOpenAI):
        async def _prepare_options(self, options: Any) -> Any:
            options = await super()._prepare_options(options)
            options.headers = _headers(options)
            return options

    return NamingAsyncOpenAI(**options)
