"""Facts of published models: parameters as the hub counts them in their safetensors files, and the numbers of their
``config.json``. Of gpt-oss and GLM-4.5-Air the parameters are those of their cards; of DeepSeek-V3 they are without the
module for multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FACTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    name: (one["parameters"], one["config"]) for name, one in _FACTS.items()
}
"""Name -> parameters, config.json."""
