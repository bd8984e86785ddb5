"""What a person sees of a run: progress, scores, charts, the report page."""
