"""One training loop, for distillation and for teacher correction.

train and train_together (loop), TrainingRun (run), StepMetrics (metrics).
"""
