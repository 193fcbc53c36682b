"""Command lines of engines, one module a kind: pure functions of a ``Start``. A key is never in one."""
