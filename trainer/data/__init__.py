"""Where images come from, and the batches they become."""
