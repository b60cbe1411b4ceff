"""Stages: artifacts in, one artifact out, resumable.

compress and run_stage (run), StageGraph (graph), Stage (stage), StageContext (context). Each stage has
one module in stages/, which lists them in order.
"""
