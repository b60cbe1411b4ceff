"""The training loop, for distillation and for teacher correction.

loop                 train, train_together: the algorithm on one screen
run                  TrainingRun: forward and backward pass, update, log, save
optimizer            TrainableModel: data-parallel wrapper, optimizer, learning-rate schedule
loss                 TrainingLoss: what run_schedule calls on the last stage
options              RunOptions: where a run saves and reports
run_checkpoint       RunCheckpoints: save and resume
step_log             StepLog: add up the steps of a log interval over the ranks
metrics, throughput  StepMetrics, MetricsLog, Throughput
teacher_correction   TrainableTeacher: a teacher that is trained during distillation
distill              distill: from Python, without a recipe
profiling            Profiler
"""
