"""Talking with a trained model: in the terminal, in a web page, over HTTP."""
