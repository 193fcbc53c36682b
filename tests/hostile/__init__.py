"""Rough weather: loads, requests and machines that do harm, against whole gateways with fake engines."""
