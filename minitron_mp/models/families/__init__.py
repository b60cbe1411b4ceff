"""Model families of transformers, one file each.

FAMILIES maps model_type to family. To add a dense family, write its file, add it to FAMILIES, and
add a case to tests/unit/test_hf.py.
"""

from minitron_mp.models.families.family import Family
from minitron_mp.models.families.llama import LLAMA
from minitron_mp.models.families.mistral import MISTRAL
from minitron_mp.models.families.nemotron import NEMOTRON
from minitron_mp.models.families.qwen2 import QWEN2
from minitron_mp.models.families.qwen3 import QWEN3
from minitron_mp.models.families.seed_oss import SEED_OSS

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        NEMOTRON,
        SEED_OSS,
    )
}
"""model_type of config.json -> family."""
