"""What a model is, free of frameworks: front ends, cards, audio reading, metrics, shipped weights."""
