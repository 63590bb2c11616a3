"""Phase 1: run a frozen vision-language teacher once and keep what it said. Not for training: see `student`."""

__version__ = "0.1.0"
