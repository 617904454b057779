"""Use the devices: mesh, processes, and what a command sets up."""
