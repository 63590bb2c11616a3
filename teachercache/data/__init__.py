"""From a person's files to a manifest, pictures and views."""
