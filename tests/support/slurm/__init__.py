"""A real Slurm on this one machine: controller, nodes, accounting, each node with its own address and fake GPUs."""
