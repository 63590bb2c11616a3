"""Train or assemble small teachers."""
