"""Serve caches in the browser: search, neighbors and filters, also of two caches side by side."""
