"""Figures of the report, as SVG elements inside the page. Only this folder uses matplotlib.

Each function takes plain numbers and returns a document.Figure. No information depends on colour
alone: pruned parts are hatched or marked, lines have labels, and every figure has a sentence with
the same content for readers who cannot see it.
"""
