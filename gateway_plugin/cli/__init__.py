"""The command line ``gateway``: parse, call one function, show a table or JSON."""
