"""Inference: loads a saved model, finds the digits in pictures, and classifies them."""
