"""CLIP teachers: towers, inner layers, word selection and loading."""
