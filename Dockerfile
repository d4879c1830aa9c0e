# A worker and the lab's page, from one wheel. How to build and run them: docs/deploy.md, In a container.

FROM python:3.13-slim-trixie AS wheel
WORKDIR /clone
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim-trixie AS base
# The user of the home: a volume that is mounted there belongs to it.
RUN useradd --uid 1000 --create-home --home-dir /var/lib/loractl loractl
COPY --from=wheel /wheels /wheels

FROM base AS web
RUN pip install --no-cache-dir "$(echo /wheels/loractl-*.whl)[web,postgres,s3]"
USER 1000
ENV LORACTL_HOME=/var/lib/loractl
EXPOSE 8470
# On any address but the machine's own it asks for a token, which it prints.
CMD ["loractl", "web", "--host", "0.0.0.0"]

FROM base AS worker
# training.torch_compile compiles kernels: torch needs g++ for the processor, Triton a C compiler for a card.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "$(echo /wheels/loractl-*.whl)[worker,postgres,s3]"
USER 1000
ENV LORACTL_HOME=/var/lib/loractl
# No shell stands between: SIGTERM reaches the worker, which saves its jobs.
CMD ["loractl", "worker"]
