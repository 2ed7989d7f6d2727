# tuner in a container, with PyTorch for CPUs or for CUDA:
#     docker build -t tuner .
#     docker build -t tuner --build-arg TORCH=cu130 .
# TORCH is a folder of PyTorch's wheel index. docs/how-to/install.md has the commands that run it.
FROM python:3.12-slim AS build
ARG TORCH=cpu
RUN python -m venv /opt/tuner
ENV PATH=/opt/tuner/bin:$PATH
WORKDIR /source
COPY constraints.txt .
# from its own index PyTorch comes first, and alone: the index does not have the pinned versions of all else
RUN grep -E '^torch(vision)?==' constraints.txt > torch.txt \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" -r torch.txt
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/tuner /opt/tuner
ENV PATH=/opt/tuner/bin:$PATH
RUN useradd --create-home --uid 1000 tuner \
    && install --directory --owner=tuner --group=tuner /work /home/tuner/.cache
USER 1000
WORKDIR /work
# outputs/ and multirun/ are in the first, features and downloaded weights in the second
VOLUME ["/work", "/home/tuner/.cache"]
ENTRYPOINT ["tuner"]
CMD ["--help"]
