"""Runs in a Kubernetes cluster: manifests, API client, following a run, fetching its files."""
