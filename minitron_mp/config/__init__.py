"""What a recipe may contain: frozen schemas, the rules between them, and YAML.

recipe         Recipe, load_recipe, make_recipe, recipe_yaml
yaml_values    values of YAML files and of overrides
base           Section, the base class of all sections
blend          UserTexts, Share: texts of a part, and their shares
paths          UserPath: ~ and environment variables in paths
data           DataConfig, EvaluateConfig, ExportConfig
parallel       ParallelConfig
pruning        ScoreConfig, TargetConfig, DepthConfig, SearchConfig
training       TrainingConfig, CorrectionConfig, ProfileConfig
distillation   DistillConfig, TeacherConfig, HiddenStatesConfig
log            LogConfig: experiment trackers
rounds         RoundConfig: further rounds, and the recipe of a round
mistakes       mistakes in a recipe as sentences
rules          rules across sections; engine_rules: those of Transformer Engine, FP8 and
               the precision of the optimizer
reference      the reference of all keys (docs/reference.md)

No file of a model is opened here.
"""
