"""Kinds of decoder layers. Each file lists the parameters of one kind.

PARAMETERS (dense): attention and a dense MLP.
"""
