# The trainer and its dashboard. Needs no BuildKit. For a GPU:
#     docker build -t hybrid-vit-cascade .
# without one, a tenth of the size:
#     docker build -t hybrid-vit-cascade:cpu --build-arg BASE_IMAGE=ubuntu:24.04 \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# The torch wheel brings its own CUDA libraries, so the smallest CUDA image is enough.
ARG BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS dependencies

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The versions are the distribution's: it removes the one before as soon as it has a security fix.
# python3-venv: pip, which stays in this stage
# ca-certificates: pip talks TLS
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 \
        python3-venv \
        ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/venv

# 2.11 is the last torch with a wheel for CUDA 12.8, which runs from Turing to Blackwell on 12.x drivers. An empty
# TORCH_INDEX takes it from where pip looks by default. torch comes first: it is large and seldom changes.
ARG TORCH=torch==2.11.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu128
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"

COPY requirements.txt /tmp/requirements.txt
RUN grep -v '^torch==' /tmp/requirements.txt >/tmp/without-torch.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir -r /tmp/without-torch.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python check


# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# python3: runs everything
# ca-certificates: TLS to Weights & Biases and to the API that stops a pod
# openssh-server: shells and copying on a pod; runs only where PUBLIC_KEY is set. Its host keys are made at that
#     moment: keys of the image would be everybody's
# rsync: brings data in and checkpoints out, and goes on where it was cut off
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 \
        ca-certificates \
        openssh-server \
        rsync \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*

COPY --from=dependencies /opt/venv /opt/venv

# The code lies in /opt, because the volume hides /workspace. It is compiled here and nothing is written beside it later,
# so it works on a read-only root too. REVISION is the commit, for the record of a run at W&B: the image has no .git.
COPY . /opt/hybrid_vit_cascade
ARG REVISION=
RUN echo "${REVISION}" >/opt/hybrid_vit_cascade/REVISION \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/hybrid_vit_cascade/app \
    && install -m 644 /opt/hybrid_vit_cascade/docker/profile.sh /etc/profile.d/hybrid_vit_cascade.sh

# NVIDIA_DRIVER_CAPABILITIES: utility is NVML, for the gpu/ curves.
# NVIDIA_DISABLE_REQUIRE: the base image refuses drivers that would work; the trainer checks for itself.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/hybrid_vit_cascade \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_DISABLE_REQUIRE=1 \
    WORKSPACE=/workspace \
    CONFIG=/opt/hybrid_vit_cascade/configs/demo.yaml \
    DASHBOARD_HOST=0.0.0.0 \
    PORT=6006

LABEL org.opencontainers.image.title="hybrid-vit-cascade" \
      org.opencontainers.image.description="Trains a cascade of 3D diffusion models, two radiographs to a CT volume, and resumes by itself. Research use, not for clinical use."

WORKDIR /opt/hybrid_vit_cascade
VOLUME /workspace
EXPOSE 6006
# On the machines of a cluster but the first nothing is served.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; from app.env import cluster_node; node = cluster_node(); node and node.rank or urllib.request.urlopen('http://127.0.0.1:6006/healthz', timeout=4)"]
ENTRYPOINT ["/opt/hybrid_vit_cascade/docker/entrypoint.sh"]
