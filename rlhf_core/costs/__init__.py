"""What an iteration costs on hardware that may not be here: memory of a device, and seconds of each stage."""
