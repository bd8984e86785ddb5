"""Manifests, the API server, and a run in a cluster."""
