"""Files of the state folder as models: read across versions. ``files.py`` writes them and reads their JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from gateway_plugin.files import Garbled, beside, read_object, set_aside, write_private


class State(BaseModel):
    """Base of what state files hold. Keys of a newer version are kept; one that an older version did not write has its
    default."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")


class LenientState(State):
    """One whose every field has a default, which also replaces a value of a wrong type."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_default(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return cls.model_fields[str(info.field_name)].get_default(call_default_factory=True)


StateT = TypeVar("StateT", bound=State)


class StateFile(Generic[StateT]):
    """A file that holds one ``kind`` of state as a JSON object."""

    def __init__(self, path: Path, kind: type[StateT]) -> None:
        self.path = path
        self._kind = kind

    def read(self) -> StateT | None:
        """What the file holds; ``None`` if there is none. Raises ``Garbled``, or ``OSError`` if it cannot be read."""
        document = read_object(self.path)
        try:
            return None if document is None else self._kind.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise Garbled(f"{self.path} is garbled ({where}: {first['msg']})") from None

    def read_or_none(self) -> StateT | None:
        """``read``; ``None`` also for a file that cannot be read."""
        try:
            return self.read()
        except (OSError, Garbled):
            return None

    def write(self, state: StateT) -> None:
        """Replace the file. Raises ``OSError``; the old content is there then."""
        write_private(self.path, state_text(state))

    def replace_garbled(self, state: StateT) -> Path:
        """``write`` where the file is garbled. Returns the name it has been set aside as.

        Raises ``OSError``; the garbled file keeps its name then: a missing one would be no warning.
        """
        with beside(self.path, state_text(state)) as fresh:
            aside = set_aside(self.path)
            os.replace(fresh, self.path)
        return aside


def state_text(state: State) -> str:
    """The JSON text of a state file, in ASCII: bytes of a path that are no UTF-8 are escaped, and read back."""
    return json.dumps(state.model_dump(mode="json"), indent=1) + "\n"
