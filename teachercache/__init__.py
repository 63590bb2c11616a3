"""Phase 1 of distillation: run a frozen vision-language teacher once and store its outputs."""

__version__ = "0.1.0"
