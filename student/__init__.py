"""Phase 2 of distillation: train students on cached teacher outputs, one recipe per paper."""
