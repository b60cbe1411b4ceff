"""Figures of the report, as SVG elements inside the page; the only user of matplotlib.

A figure takes plain numbers and returns a document.Figure. No information is carried by colour
alone: pruned parts are hatched or marked, lines have labels, and every figure has a sentence that
states the same for readers who cannot see it.
"""
