# syntax=docker/dockerfile:1
# Usage: docker build -t edgekd . && docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" \
#   edgekd compress teacher --data texts --speedup 4 --out run
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# PyPI's torch brings CUDA; where an index has the CPU build, an eighth the size: --build-arg TORCH_INDEX=its address
ARG TORCH_INDEX=
RUN python -m venv /opt/edgekd
COPY pyproject.toml README.md LICENSE /src/
COPY targets /src/targets
COPY profiles /src/profiles
COPY edgekd /src/edgekd
RUN python -m pip wheel --no-deps --wheel-dir /wheels /src \
 && /opt/edgekd/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} /wheels/*.whl \
 && /opt/edgekd/bin/edgekd --help > /dev/null

FROM python:${PYTHON} AS runtime
LABEL org.opencontainers.image.title="edgekd" \
      org.opencontainers.image.description="Compress Hugging Face models for edge devices" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 10001 edgekd && install -d -o edgekd -g edgekd /data
COPY --from=builder /opt/edgekd /opt/edgekd
# Whoever runs it, with --user, has a place for caches.
ENV PATH=/opt/edgekd/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001
WORKDIR /data
ENTRYPOINT ["edgekd"]
CMD ["--help"]
