"""Recipes: frozen schemas, the rules between their sections, and YAML.

recipe          Recipe, load_recipe, make_recipe, save_recipe
data, distillation, parallel, pruning, training   the sections
rules           rules between sections; engine_rules has those of Transformer Engine
reference       the reference of all keys
base            Section, the base class of all sections

This package opens no file of a model.
"""
