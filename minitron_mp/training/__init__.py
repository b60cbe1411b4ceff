"""The training loop, for distillation and for teacher correction.

loop                 train_one, train_together: the training algorithm
run                  TrainingRun: forward and backward pass, update, log, save
optimizer            TrainableModel: data-parallel wrapper, optimizer, learning-rate schedule
loss                 TrainingLoss: the loss function that run_schedule calls on the last stage
options              RunOptions: checkpoints, seed and callbacks of a run
run_checkpoint       RunCheckpoints: save and resume
step_log             StepLog: sums of a log interval over the ranks
metrics, throughput  StepMetrics, MetricsLog, Throughput
experiment_trackers  ExperimentLog: metrics to Weights & Biases and MLflow
teacher_correction   TrainableTeacher: a teacher that is trained during distillation
distill              distill, train: from Python, without a recipe
non_finite           first rank and parameter of a gradient that is not finite
stragglers           StragglerWatch: the slowest rank of a log interval
validation, spikes   loss on held-out text and early stop; spikes of the training loss
profiling            Profiler: traces of chosen steps
"""
