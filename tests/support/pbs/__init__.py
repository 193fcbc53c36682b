"""A stand-in for PBS Pro: no PBS is packaged for the systems that the tests run on."""
