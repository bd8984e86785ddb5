"""Data sets, and the batches of examples made from them."""
