"""Measures the classifier and its heatmaps on labelled pictures. Nothing in the root imports it."""
