"""Stages: artifacts in, one artifact out, resumable.

compress and run_stage (run), StageGraph (graph), StageContext (context); one file for each stage in stages/.
"""
