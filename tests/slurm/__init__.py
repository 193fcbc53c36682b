"""What only a real Slurm can show."""
