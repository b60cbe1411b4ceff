"""What the user may ask for: frozen schemas of the recipe, and YAML. No file of a model is opened here.

Recipe, load_recipe, make_recipe, save_recipe (recipe); one file for each group of sections.
"""
