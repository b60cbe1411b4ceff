"""Our student, teacher and loss in Megatron-Bridge's pretrain().

student_provider (model), ColocatedTeacher and RemoteTeacher (teacher), KDForwardStep (forward_step), check_config
(checks), export_student (export).
"""
