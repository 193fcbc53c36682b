"""Rough weather: each file one way in which callers or the machine are unkind, at a size that fits the gate."""
