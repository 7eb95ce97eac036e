"""Serving a mixture over HTTP. Nothing here yet."""
