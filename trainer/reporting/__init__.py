"""Output about a run: progress, TensorBoard events, scores, charts and the report page."""
