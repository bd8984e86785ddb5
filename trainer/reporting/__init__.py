"""What is shown of a run: progress, TensorBoard events, scores, charts and the report page."""
