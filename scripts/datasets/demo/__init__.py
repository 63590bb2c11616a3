"""Build the demo data: real pictures with captions from Debian packages, or a fallback from PyPI."""
