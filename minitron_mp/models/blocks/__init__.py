"""Kinds of decoder layers, one file each: the parameters that a layer of this kind has.

PARAMETERS (dense): attention and a dense MLP.
"""
