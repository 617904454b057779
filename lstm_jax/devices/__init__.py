"""Use the devices: mesh, processes, batches on the device, and what a command sets up."""
