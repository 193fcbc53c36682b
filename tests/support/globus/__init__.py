"""Globus Compute without the cloud: a stand-in for the web service, and everything else real."""
