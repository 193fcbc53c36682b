"""``gateway up`` and ``gateway down``."""
