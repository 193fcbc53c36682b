"""Clients of a gateway whose blocks are jobs of a real Slurm."""
