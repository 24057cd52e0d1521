# npedit with PyTorch's CUDA build, for NVIDIA GPUs. docs/install.md explains how to use it.
#
#   docker build -t npedit .
#   docker run --rm --gpus all npedit doctor
#
# This file has not been built yet: tests/repository/test_docker.py checks it without Docker.
FROM python:3.12-slim-bookworm

# Models are downloaded to the volume /cache. Any user may write there: docker run --user.
ENV HOME=/cache HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib \
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --uid 1000 --home-dir /cache --no-create-home npedit && install --directory --mode=1777 /cache /work

# PyTorch has its own layer, so that a change of npedit does not download it again.
WORKDIR /build
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
ARG EXTRAS=8bit
RUN pip install --constraint constraints.txt ".[${EXTRAS}]"

USER npedit
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["npedit"]
CMD ["--help"]
