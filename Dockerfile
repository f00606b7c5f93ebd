# Two images from one file, each a closed set of locked packages on a plain Python:
#   docker build --target cpu -t mora-serve:0.1.0-cpu .   embedded profile, no GPU
#   docker build --target gpu -t mora-serve:0.1.0-gpu .   vLLM's CUDA build; the driver is the host's
# Python packages have the locks' versions (without hashes: the index is trusted), and a digest in BASE pins
# the base. apt's packages and file times are those of the build, so that two images are not alike by byte.
# The gpu target alone ships a compiler, gcc; its stage says why.
ARG BASE=docker.io/library/python:3.11-slim

# --- what is built ---------------------------------------------------------------------------------
# The base's pip installs into /app, which never holds one of its own.
# hadolint ignore=DL3006
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /app

FROM build AS packages-cpu
# Where PyTorch's CPU builds are; asked when pip's own sources have none.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/image-cpu.lock requirements/
RUN torch="$(grep '^torch==' requirements/image-cpu.lock)" \
    && { python -m pip --python /app/bin/python install --no-deps "${torch}" \
        || python -m pip --python /app/bin/python install --no-deps -i "${TORCH_INDEX}" "${torch}"; } \
    && python -m pip --python /app/bin/python install --no-deps -r requirements/image-cpu.lock

FROM build AS packages-gpu
COPY requirements/image-gpu.lock requirements/
RUN python -m pip --python /app/bin/python install --no-deps -r requirements/image-gpu.lock

# The sources are a layer of their own: a change of them moves a megabyte, not the packages. They are
# built with a lock's setuptools, not with whichever is the newest.
FROM build AS code
COPY requirements/image-cpu.lock requirements/
RUN setuptools="$(grep '^setuptools==' requirements/image-cpu.lock)" \
    && python -m pip --python /app/bin/python install --no-deps "${setuptools}"
COPY pyproject.toml LICENSE README.md ./
COPY mora_serve mora_serve
COPY actors actors
COPY api api
COPY trainer trainer
RUN python -m pip --python /app/bin/python install --no-deps --no-build-isolation --prefix /mora .

# --- what is shipped -------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS runtime
LABEL org.opencontainers.image.title="mora-serve" \
      org.opencontainers.image.description="Multi-reward pre-sampling, prompt rewriting and DPO as a service" \
      org.opencontainers.image.licenses="Apache-2.0"
# libnuma is vLLM's; its version follows the base image. The profile is for login shells, which reset
# PATH: KubeRay starts `ray` in one where its operator has ENABLE_LOGIN_SHELL.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
    && python -m pip uninstall --yes --root-user-action ignore pip setuptools wheel \
    && echo "PATH=/app/bin:\$PATH" > /etc/profile.d/mora-serve.sh \
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
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('MORA_SERVER__PORT', '8000') + '/readyz', timeout=8)"]
# Alone a container serves what its profile starts: all of `embedded`, and `gpu` only beside a store
# (MORA_REDIS__URL) and enough GPUs. KubeRay starts `ray` in its place.
CMD ["mora-serve", "up", "--host", "0.0.0.0"]

FROM runtime AS cpu
ENV MORA_PROFILE=embedded
USER 10001:10001
COPY --from=packages-cpu /app /app
COPY --from=code /mora /app
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"

FROM runtime AS gpu
# gcc stays: Triton compiles its driver module (one C file, beside Python.h of the base) when a process
# first launches a kernel and its cache has none; the module links the host's libcuda, and the cache is
# a volume, so it cannot be brought along. No nvcc and no C++: what FlashInfer would compile, vLLM leaves
# out where it finds neither, but for its sampler, which is on by default and would end the engine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
ENV MORA_PROFILE=gpu \
    VLLM_USE_FLASHINFER_SAMPLER=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
COPY --from=packages-gpu /app /app
COPY --from=code /mora /app
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
