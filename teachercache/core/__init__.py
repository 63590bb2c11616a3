"""Errors, paths, URLs, devices, processes and progress: what every other floor stands on."""
