"""Synthetic scenes: images and short videos with narratives, traces, masks and questions, from a seed."""
