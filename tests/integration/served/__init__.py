"""Clients of a gateway that runs, with fake engines."""
