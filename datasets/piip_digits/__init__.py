"""Handwritten digits on photographs, from images in wheels: scenes, data sets, and a small pyramid for them."""
