"""Globus Compute: the function that runs on the endpoint, and the endpoint itself."""
