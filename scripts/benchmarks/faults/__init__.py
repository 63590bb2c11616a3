"""Faults: kills, torn writes, full disks, I/O errors and flipped bits, and whether the next command recovers."""
