"""What a recipe may contain: frozen schemas, the rules between them, and YAML.

No file of a model is opened here.

Recipe, load_recipe, make_recipe, save_recipe (recipe); rules across sections (rules); the reference
of all keys (reference); one file for each group of sections.
"""
