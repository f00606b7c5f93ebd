# Two images from one file, each a closed set of locked packages on a plain Python:
#   docker build --target cpu -t mora-serve:0.1.0-cpu .   embedded profile, no GPU
#   docker build --target gpu -t mora-serve:0.1.0-gpu .   vLLM's CUDA build; the driver is the host's
# Pin BASE by digest for builds that repeat byte for byte.
ARG BASE=docker.io/library/python:3.11-slim

# --- what is built ---------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv --copies /app

# hadolint ignore=DL3006
FROM ${BASE} AS sources
WORKDIR /src
COPY pyproject.toml LICENSE README.md ./
COPY mora_serve mora_serve
COPY actors actors
COPY api api
COPY trainer trainer

# Packages first: a change of the sources installs nothing else anew. The sources are built with the
# lock's setuptools, not with whichever is the newest.
FROM build AS build-cpu
# Where PyTorch's CPU builds are; asked when pip's own sources have none.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/image-cpu.lock requirements/
RUN torch="$(grep '^torch==' requirements/image-cpu.lock)" \
    && { /app/bin/pip install --no-deps "${torch}" \
        || /app/bin/pip install --no-deps -i "${TORCH_INDEX}" "${torch}"; } \
    && /app/bin/pip install --no-deps -r requirements/image-cpu.lock
COPY --from=sources /src /src
RUN /app/bin/pip install --no-deps --no-build-isolation . && /app/bin/pip uninstall --yes pip

FROM build AS build-gpu
COPY requirements/image-gpu.lock requirements/
RUN /app/bin/pip install --no-deps -r requirements/image-gpu.lock
COPY --from=sources /src /src
RUN /app/bin/pip install --no-deps --no-build-isolation . && /app/bin/pip uninstall --yes pip

# --- what is shipped -------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="mora-serve" \
      org.opencontainers.image.description="Multi-reward pre-sampling, prompt rewriting and DPO as a service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# libnuma is vLLM's; its version follows the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 mora \
    && useradd --uid 10001 --gid mora --create-home --shell /usr/sbin/nologin mora \
    && install --directory --owner mora --group mora /var/lib/mora /var/cache/mora
ENV PATH=/app/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MORA_DATA_DIR=/var/lib/mora
WORKDIR /home/mora
VOLUME /var/lib/mora
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=600s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=8)"]
# Alone a container serves what its profile starts: all of `embedded`, and `gpu` only beside a store
# (MORA_REDIS__URL) and enough GPUs. KubeRay starts `ray` in its place.
CMD ["mora-serve", "up", "--host", "0.0.0.0"]

FROM runtime AS cpu
ENV MORA_PROFILE=embedded
USER 10001:10001
COPY --from=build-cpu /app /app

FROM runtime AS gpu
# Triton compiles the launcher of each kernel when it is first used, with the C compiler it finds.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV MORA_PROFILE=gpu \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
COPY --from=build-gpu /app /app
