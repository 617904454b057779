"""Use the devices: mesh, processes, batches on the device, compilation cache."""
