# tuner in a container, with PyTorch's default wheels (CUDA; they run on CPUs, too), or those of another index:
#     docker build -t tuner .
#     docker build -t tuner --build-arg TORCH_INDEX=URL .
# URL: of the CPU wheels, on PyTorch's install page. docs/how-to/install.md has the commands that run it.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=
RUN python -m venv /opt/tuner
ENV PATH=/opt/tuner/bin:$PATH
WORKDIR /source
COPY constraints.txt .
# PyTorch comes first, and alone: its index does not have the pinned versions of all else
RUN grep -E '^torch(vision)?==' constraints.txt > torch.txt \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/tuner /opt/tuner
ENV PATH=/opt/tuner/bin:$PATH
ENV TUNER_CACHE=/cache/tuner TORCH_HOME=/cache/torch HF_HOME=/cache/huggingface
RUN useradd --create-home --uid 1000 tuner && install --directory --owner=tuner --group=tuner /data /cache
USER 1000
WORKDIR /data
# outputs/ and multirun/ are in the first, features and downloaded weights in the second
VOLUME ["/data", "/cache"]
ENTRYPOINT ["tuner"]
CMD ["--help"]
