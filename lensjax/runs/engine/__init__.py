"""The training loop, when it stops, and the devices that it runs on."""
