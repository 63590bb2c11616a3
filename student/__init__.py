"""Phase 2: train students on what a teacher said, one recipe per paper. For teachers see `teachercache`."""
