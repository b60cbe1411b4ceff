"""The stages of a run. Each reads artifacts and writes one, so a run can be resumed.

run              compress, run_stage; join: the ranks that they run on
shares           run_share: a share of a stage, for job arrays
stage, stages    Stage; one module for each stage, in order
graph            StageGraph: which stages a recipe has, and which artifacts are current
context          StageContext: a stage on one rank; stage_files: its artifacts, without ranks
earlier_rounds   artifacts of earlier rounds that a round uses; finish: the end of a run
settings         settings and fingerprints that several stages share
output_folder    what a run writes, and the user files that it keeps
preflight        checks of a recipe before a run; file_checks: of the user's files
saved_steps      --step: the model of a saved step of distill
saved_progress   whether checkpoints fit the recipe
changes          other settings in an unfinished run; resume from an older checkpoint
dry_run          dry_run
disk_sizes       DiskSizes: estimated sizes of artifacts
training         run_training: the training of the stages correct and distill
teacher_source   open_teacher: the teacher of a recipe; teacher_stream: its stream;
                 fp8_teacher: its KL to the bf16 teacher;
                 held_out_signals: its signals for the validations; host_memory: their size
"""
