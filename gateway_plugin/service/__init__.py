"""The service of one machine: a supervisor that keeps the edge, the Ray head and the Serve application alive."""
