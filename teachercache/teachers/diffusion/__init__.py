"""Stable Diffusion teachers: model, outputs and loading."""
