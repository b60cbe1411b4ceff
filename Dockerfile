# syntax=docker/dockerfile:1
# minitron_mp on NVIDIA's PyTorch image. The image's torch, Transformer Engine and Apex are not replaced.
# See docs/docker.md for how to build and run it.
#
#   docker build -t minitron-mp .
#   docker build -t minitron-mp --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3 \
#       --build-arg REVISION="$(git rev-parse HEAD)" .
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0:0
WORKDIR /opt/minitron-mp

# A folder with certificates, for sites whose proxy has private certificates.
ARG PIP_CERT
# The constraints file below replaces NVIDIA's (/etc/pip/constraint.txt), which also pins about a hundred
# packages that do not depend on the GPU.
ENV PIP_CONSTRAINT="" PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:${PATH}

# Metadata is copied before sources, so that a change of the code does not rebuild these layers. The base
# image's pip installs into the virtual environment. Its torchrun would start the Python of the base image,
# which does not have these packages, so another torchrun is written here.
COPY setup.py pyproject.toml ./
COPY constraints constraints
COPY docker docker
RUN python3 docker/base_stack.py write stack \
    && python3 -m venv --without-pip --system-site-packages /opt/venv \
    && printf '#!/bin/sh\nexec /opt/venv/bin/python -m torch.distributed.run "$@"\n' > /opt/venv/bin/torchrun \
    && chmod +x /opt/venv/bin/torchrun
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --requirement stack/requirements.txt --constraint stack/constraints.txt

COPY README.md LICENSE ./
COPY minitron_mp minitron_mp
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --no-deps . \
    && rm -rf build minitron_mp ./*.egg-info \
    && python docker/base_stack.py check stack
COPY launch launch
COPY examples examples
COPY experiments experiments

# Any user can write the caches, because pyxis and docker run --user run as other users.
ENV HOME=/home/minitron HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor MPLCONFIGDIR=/cache/matplotlib XDG_CACHE_HOME=/cache
RUN groupadd --gid 10001 minitron \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /home/minitron --create-home minitron \
    && mkdir -p /workspace /cache/huggingface /cache/triton /cache/inductor /cache/matplotlib \
    && chmod -R 1777 /workspace /cache \
    && chmod 755 /home/minitron
USER 10001:10001
WORKDIR /workspace

ARG REVISION="" BASE_IMAGE VERSION=0.1.0
LABEL org.opencontainers.image.title="minitron-mp" \
      org.opencontainers.image.description="Minitron pruning and distillation of large language models on Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"

HEALTHCHECK --interval=5m --timeout=60s --start-period=30s --retries=2 CMD ["minitron-mp", "doctor"]
# The entrypoint of the base image is kept, because it sets up the compatibility libraries of the driver.
# pyxis and enroot do not run an entrypoint.
CMD ["minitron-mp", "--help"]
