"""The web page to draw or upload a digit on, its HTTP API, and their server."""
