"""Loads and requests that are meant to do harm, against whole gateways with fake engines."""
