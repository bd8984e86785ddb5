"""Runs in a Kubernetes cluster: their manifests, the API client, following and fetching them."""
