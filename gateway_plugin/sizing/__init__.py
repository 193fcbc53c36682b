"""The memory that a model needs, worked out from its published configuration; and where it fits."""
