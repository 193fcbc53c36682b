"""On a stand-in for PBS."""
